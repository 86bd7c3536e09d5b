from pathlib import Path

import pytest

from vllm_earlyexit import embedded


def test_a_model_whose_unpacking_was_interrupted_is_unpacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    interrupted = [True, False]

    def convert(gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
        (folder / embedded.WEIGHTS).write_text("half of it" if interrupted[0] else "all of it")
        if interrupted.pop(0):
            raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_extract", lambda scratch: scratch / "model.gguf")
    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        embedded.smollm2(tmp_path / "model")
    assert not (tmp_path / "model" / embedded.WEIGHTS).exists()
    assert embedded.smollm2(tmp_path / "model") == tmp_path / "model"
    assert (tmp_path / "model" / embedded.WEIGHTS).read_text() == "all of it"
    assert interrupted == []
    embedded.smollm2(tmp_path / "model")  # not unpacked again: nobody is left to do it
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names <= {"tokenizer.json", embedded.WEIGHTS, ".lock"}
