import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.unit.helpers import make_heads, make_model
from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import load_heads
from vllm_earlyexit.heads.fingerprint import fingerprint


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    return make_heads(tmp_path / "heads", make_model(tmp_path / "model"))


def test_heads_come_back_as_saved(heads: Path):
    loaded = load_heads(heads)
    again = heads.parent / "again"
    loaded.save(again)
    first, second = load_file(heads / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert load_heads(again).config == loaded.config
    assert loaded.draft_vocab is not None
    assert loaded.draft_vocab.tolist() == [1, 2, 3, 30, 31]


def test_loading_needs_neither_transformers_nor_vllm(heads: Path):
    script = (
        "import sys; sys.modules['transformers'] = sys.modules['vllm'] = None;"
        "from pathlib import Path; from vllm_earlyexit.heads.checkpoint import load_heads;"
        "print(*load_heads(Path(sys.argv[1])).modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(heads)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(layer) for layer in load_heads(heads).modules]


def test_int8_storage_is_small_and_close(tmp_path: Path):
    loaded = load_heads(make_heads(tmp_path / "heads", make_model(tmp_path / "model")))
    loaded.save(tmp_path / "float32", "float32")
    loaded.save(tmp_path / "int8", "int8")
    exact, small = load_heads(tmp_path / "float32").modules[1], load_heads(tmp_path / "int8").modules[1]
    for (name, ours), theirs in zip(exact.named_parameters(), small.parameters(), strict=True):
        rows = ours.abs().amax(dim=-1, keepdim=True)
        assert ((ours - theirs).abs() <= rows / 127 * 0.51 + rows * 2**-8 * (ours.dim() == 1)).all(), name
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    assert stored["exits.1.mlp.gate_up.weight"].dtype == torch.int8


def test_an_interrupted_save_leaves_nothing_to_load(heads: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = load_heads(heads)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_earlyexit.heads.checkpoint.write_config", fail)
    with pytest.raises(KeyboardInterrupt):
        loaded.save(heads)
    with pytest.raises(EarlyExitError, match=r"has no config\.json"):
        load_heads(heads)


def test_weights_that_are_not_finite_are_refused(heads: Path):
    loaded = load_heads(heads)
    next(iter(loaded.modules[1].parameters())).data.view(-1)[0] = torch.nan
    loaded.save(heads)
    with pytest.raises(EarlyExitError, match="not finite"):
        load_heads(heads)


def test_a_config_of_huge_sizes_takes_no_memory(heads: Path):
    """A hidden size that would take petabytes is found not to fit the weights before anything is allocated."""
    config = heads / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 2**24}))
    with pytest.raises(EarlyExitError, match="does not fit its config"):
        load_heads(heads)


def test_nothing_is_unpickled(heads: Path, tmp_path: Path):
    """A file that would run code if it were unpickled is refused as damaged."""
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple:
            return (ran.touch, ())

    torch.save({"exits.1.scale": Payload()}, heads / "model.safetensors")
    with pytest.raises(EarlyExitError, match="is damaged"):
        load_heads(heads)
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["shared", "linear", "mlp"])
def test_an_untrained_head_is_the_shared_head(tmp_path: Path, kind: str):
    loaded = load_heads(make_heads(tmp_path / "heads", make_model(tmp_path / "model"), kind))  # type: ignore[arg-type]
    hidden = torch.randn(3, 8)
    assert torch.equal(loaded.modules[1](hidden, None), hidden)


def test_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(EarlyExitError, match=r"no heads folder .*nowhere"):
        load_heads(tmp_path / "nowhere")


def test_a_folder_that_holds_no_heads_is_named(tmp_path: Path):
    with pytest.raises(EarlyExitError, match=r"no config\.json"):
        load_heads(tmp_path)


def test_missing_weights_are_named(heads: Path):
    (heads / "model.safetensors").unlink()
    with pytest.raises(EarlyExitError, match=r"no model\.safetensors"):
        load_heads(heads)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_named(heads: Path, keep: int):
    path = heads / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(EarlyExitError, match="damaged"):
        load_heads(heads)


def test_weights_of_another_shape_are_named(heads: Path):
    path = heads / "model.safetensors"
    tensors = load_file(path)
    tensors["exits.1.down.weight"] = torch.zeros(3, 3)
    save_file(tensors, path)
    with pytest.raises(EarlyExitError, match=r"does not fit its config.*down\.weight"):
        load_heads(heads)


@pytest.mark.parametrize(
    ("field", "value"),
    [("exits", []), ("draft_vocab_size", 999), ("fingerprint", "x"), ("num_layers", 2), ("surprise", 1)],
)
def test_a_config_that_makes_no_sense_is_refused(heads: Path, field: str, value: object):
    path = heads / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(EarlyExitError, match="not a valid heads config"):
        load_heads(heads)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=st.binary(max_size=200))
def test_any_bytes_in_the_config_give_a_clear_error(heads: Path, config: bytes):
    (heads / "config.json").write_bytes(config)
    with pytest.raises(EarlyExitError):
        load_heads(heads)


def test_the_fingerprint_ignores_storage_types_and_tells_models_apart(tmp_path: Path):
    model = make_model(tmp_path / "model")
    before = fingerprint(model)
    assert fingerprint(make_model(tmp_path / "other", seed=1)) != before
    path = model / "model.safetensors"
    save_file({name: value.to(torch.bfloat16) for name, value in load_file(path).items()}, path)
    assert fingerprint(model) == before


def test_a_model_without_safetensors_cannot_be_identified(tmp_path: Path):
    model = make_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    with pytest.raises(EarlyExitError, match="no safetensors weights"):
        fingerprint(model)
