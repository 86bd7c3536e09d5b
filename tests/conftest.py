"""Fixtures shared by all tests, and the environment in which vLLM runs in process."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(str(core) for core in sorted(os.sched_getaffinity(0))))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

BUILD = Path(__file__).parents[1] / "build"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model's folder, built once."""
    from vllm_earlyexit.embedded import smollm2

    return smollm2(BUILD / "smollm2-135m-instruct")


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Real prompts, never trained or tuned on."""
    from vllm_earlyexit.assets import DEMO_PROMPTS

    return [json.loads(line)["turns"][0] for line in DEMO_PROMPTS.read_text().splitlines()]
