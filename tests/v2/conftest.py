"""Fixtures of the engine's tests that are wanted here, too, and plain V2's answers."""

from functools import partial
from pathlib import Path

import pytest

from tests.engine import reference
from tests.engine.conftest import Shared, engine, ladder, runner_of, shared
from tests.engine.reference import Reference

__all__ = ["ladder", "shared"]

PROMPTS, TOKENS, BATCH, FEW = 12, 32, 4, 4
FIXED = {"method": "self_exit", "policy": "fixed", "num_speculative_tokens": 3}
answer = partial(reference.answer, max_tokens=TOKENS)


@pytest.fixture(scope="session")
def plain(smollm2: Path, prompts: list[str], shared: Shared) -> Reference:
    """Plain V2's answers to a few prompts, up to ``BATCH`` at a time."""

    def ask() -> list[list[int]]:
        with engine(smollm2) as llm:
            assert hasattr(runner_of(llm), "speculator")
            return answer(llm, prompts[:PROMPTS], BATCH)

    return Reference(smollm2, prompts[:PROMPTS], {BATCH: shared("plain-v2", ask)}, least=FEW, most=1)
