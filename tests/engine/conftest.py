"""Drive vLLM in process: one engine at a time, always shut down."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from filelock import FileLock

from tests import interpreter
from tests.engine.heads import ladder_heads
from tests.engine.reference import Reference, answer

Shared = Callable[[str, Callable[[], Any]], Any]


def clean_up() -> None:
    """Forget what an engine that was shut down, and that nobody refers to any more, has left in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_earlyexit.engine import seams

    seams.remove("engine")
    gc.collect()
    cleanup_dist_env_and_memory()


@contextmanager
def engine(model: Path, **arguments: Any) -> Iterator[Any]:
    """An in-process vLLM engine, float32 and eager unless told otherwise; all its state is gone afterwards."""
    from vllm import LLM

    from vllm_earlyexit.engine import cost, seams

    if interpreter.ON_V2:
        interpreter.mend()
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8, "seed": 0}
    # Tests share the machine, and none is about speed: step times are taken once, at few sizes.
    with patch.multiple(cost, quiet=lambda runs: True, SIZES=(1, 4, 16), FEWEST=1, ENOUGH=0.0):
        llm = LLM(str(model), disable_log_stats=False, **(defaults | arguments))
    try:
        assert not (seams.built_in() and seams.applied())
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        clean_up()


def runner_of(llm: Any) -> Any:
    """The model runner inside an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def adapter_of(llm: Any) -> Any:
    """Our proposer or speculator inside an in-process engine."""
    from vllm_earlyexit.engine import rounds

    return rounds.adapter_of(runner_of(llm))


def counters(llm: Any) -> dict[str, int]:
    """vLLM's own speculation counters: drafts, draft_tokens, accepted_tokens."""
    prefix = "vllm:spec_decode_num_"
    return {
        metric.name.removeprefix(prefix): int(metric.value)
        for metric in llm.get_metrics()
        if metric.name.startswith(prefix) and hasattr(metric, "value")
    }


@pytest.fixture(scope="session")
def ladder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Heads with several exits."""
    return str(ladder_heads(tmp_path_factory.mktemp("ladder") / "heads", smollm2))


@pytest.fixture(scope="session")
def shared(worker_id: str, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Makes what all processes that share the tests need: the first one that does. It goes through JSON."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent

    def made(name: str, make: Callable[[], Any]) -> Any:
        kept = folder / f"{name}.json"
        with FileLock(folder / f"{name}.lock"):
            if not kept.exists():
                kept.write_text(json.dumps(make()))
        return json.loads(kept.read_text())

    return made


@pytest.fixture(scope="session")
def plain(smollm2: Path, prompts: list[str], matrix: str, shared: Shared) -> Reference:
    """Plain vLLM's answers to all prompts."""
    assert len(prompts) >= 24
    sizes = (8,) if matrix == "small" else (8, 1)

    def ask() -> list[list[list[int]]]:
        with engine(smollm2) as llm:
            return [answer(llm, prompts, size) for size in sizes]

    return Reference(smollm2, prompts, dict(zip(sizes, shared("plain", ask), strict=True)))


@pytest.fixture(autouse=True)
def _single_seeded() -> None:
    torch.manual_seed(0)
