"""Two ranks on Model Runner V2 draft what one rank drafts, and answer what plain V2 answers."""

import os
from pathlib import Path

import pytest

from tests.engine.test_ranks import check_two_ranks, recurrent_heads
from tests.engine.tiny import tiny_model

ROOT = Path(__file__).parents[2]


def test_two_ranks_draft_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'workers'}{os.pathsep}{ROOT}")
    model = tiny_model(tmp_path / "model")
    setting = {"method": "self_exit", "model": str(recurrent_heads(tmp_path / "heads", model))}
    check_two_ranks(model, setting, monkeypatch)
