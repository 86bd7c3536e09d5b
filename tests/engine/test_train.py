"""Training and calibration on the real model, end to end, through the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_earlyexit.cli import app
from vllm_earlyexit.heads.checkpoint import read_config

TEXT = Path(__file__).parents[2] / "LICENSE"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "licence.jsonl"
    parts = TEXT.read_text().split("\n\n")
    lines = [{"id": n, "text": "\n\n".join(parts[n : n + 4])} for n in range(0, len(parts), 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(("kind", "epochs"), [("mlp", "32"), ("tail", "8")])  # without attention, learning is slower
def test_heads_learn_the_text_they_are_trained_on(smollm2: Path, data: Path, tmp_path: Path, kind: str, epochs: str):
    common = ("--data", data, "--exit-layer", "15", "--draft-vocab-size", "2048")
    run("train", smollm2, *common, "--out", tmp_path / "before", "--kind", "shared")
    run("train", smollm2, *common, "--out", tmp_path / "after", "--kind", kind, "--epochs", epochs)
    for name in ("before", "after"):
        run("calibrate", smollm2, tmp_path / name, "--data", data)
    before, after = (read_config(tmp_path / name).exits[0].calibration for name in ("before", "after"))
    assert before is not None
    assert after is not None
    assert after.agreement > before.agreement + 0.15
    assert read_config(tmp_path / "after").provenance["scored_tokens"] > 12_000


def test_an_exit_beyond_the_model_is_one_sentence(smollm2: Path, data: Path, tmp_path: Path):
    arguments = ["train", str(smollm2), "--data", str(data), "--exit-layer", "30", "--out", str(tmp_path / "heads")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "exit layers must lie between 1 and 29" in " ".join(result.output.split())
    assert not (tmp_path / "heads").exists()
