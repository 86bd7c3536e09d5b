"""Fixtures shared by all tests, and the environment in which vLLM runs in process."""

import json
import os
from pathlib import Path

BUILD = Path(__file__).parents[1] / "build"
WORKER, WORKERS = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))


def own_cores() -> list[int]:
    """Return the cores that this process computes on: of several that share the tests, each has its own, if it can."""
    cores = sorted(os.sched_getaffinity(0))
    return cores if WORKER is None else cores[int(WORKER.removeprefix("gw")) :: WORKERS] or cores


if WORKER is not None:  # before PyTorch is imported
    os.environ["OMP_NUM_THREADS"] = str(len(own_cores()))
    os.environ["VLLM_CACHE_ROOT"] = str(BUILD / "vllm-cache" / WORKER)  # vLLM's compiler does not expect company
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, own_cores())))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import pytest  # noqa: E402

from tests import interpreter  # noqa: E402

if interpreter.ON_V2:
    interpreter.stand_in()
collect_ignore = [] if interpreter.ON_V2 else ["v2"]  # make test-v2

MATRIX = {"small": 0, "usual": 1, "full": 2}  # small leaves out asking one at a time; see engine/conftest.py


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much is tried of what comes in many combinations."""
    parser.addoption("--matrix", choices=MATRIX, default="usual", help="how many combinations are tried")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked for a fuller matrix."""
    chosen = MATRIX[config.getoption("matrix")]
    left_out = [
        item for item in items if chosen < max((MATRIX[m.args[0]] for m in item.iter_markers("matrix")), default=0)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def matrix(request: pytest.FixtureRequest) -> str:
    """How many combinations are tried: small, usual or full."""
    return request.config.getoption("matrix")


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
