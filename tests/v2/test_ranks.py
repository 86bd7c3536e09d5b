"""Two ranks on Model Runner V2 draft what one rank drafts, and answer what plain V2 answers."""

import os
from pathlib import Path

import pytest

from tests.engine.test_ranks import answers, recurrent_heads
from tests.engine.tiny import tiny_model

ROOT = Path(__file__).parents[2]


def test_two_ranks_draft_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'workers'}{os.pathsep}{ROOT}")
    cores = sorted(os.sched_getaffinity(0))
    model = tiny_model(tmp_path / "model")
    heads = str(recurrent_heads(tmp_path / "heads", model))
    setting = {"method": "self_exit", "model": heads, "policy": "fixed", "num_speculative_tokens": 3}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(cores[0]))
    alone, counted_alone = answers(model, 1, setting)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    plain, _ = answers(model, 2, None)
    found, counted = answers(model, 2, setting)
    assert found == plain == alone
    assert counted == counted_alone
    assert counted["draft_tokens"] > counted["accepted_tokens"] > 20
