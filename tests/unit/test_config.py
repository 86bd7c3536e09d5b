import contextlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.helpers import make_heads, make_model
from vllm_earlyexit import config as config_module
from vllm_earlyexit.config import CONFIG_KEY, AdditionalConfig, EarlyExitConfig, Knobs, knobs_from, resolve
from vllm_earlyexit.errors import EarlyExitError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def heads(tmp_path: Path, model: Path) -> Path:
    return make_heads(tmp_path / "heads", model)


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        ({"method": "self_exit"}, {}, Knobs()),
        ({"method": "self-exit", "exit-layer": 3}, {}, Knobs(exit_layer=3)),
        (None, {"model": "[self-exit]"}, Knobs()),
        (None, {"model": "[self-exit]:some/heads", "tokens": 2}, Knobs(model="some/heads", num_speculative_tokens=2)),
        ({"policy": "fixed"}, {"model": "[self-exit]:h"}, Knobs(model="h", policy="fixed")),
        ({"model": "[self-exit]:h"}, {}, Knobs(model="h")),
    ],
)
def test_every_spelling_asks_for_self_exit(config: dict | None, flags: dict, expected: Knobs):
    arguments = {"method": None, "model": None, "tokens": None} | flags
    assert knobs_from(config, **arguments) == expected


@pytest.mark.parametrize(
    ("config", "model"),
    [(None, None), ({"method": "ngram", "num_speculative_tokens": 3}, None), (None, "some/draft-model")],
)
def test_other_requests_are_not_ours(config: dict | None, model: str | None):
    assert knobs_from(config, None, model, None) is None


def test_contradictions_of_other_methods_are_left_to_vllm():
    assert knobs_from({"method": "ngram", "num_speculative_tokens": 3}, None, None, 4) is None


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"exit_layr": 3}, r"no knob 'exit_layr'; the knobs are method, model, exit_layer"),
        ({"exit_layer": 0}, r"exit_layer=0 does not work: .*greater than 0"),
        ({"num_speculative_tokens": 0}, r"num_speculative_tokens=0 does not work: .*greater than 0"),
        ({"num_speculative_tokens": 65}, r"less than or equal to 64"),
        ({"policy": "greedy"}, r"policy='greedy' does not work: .*'auto', 'entropy' or 'fixed'"),
        ({"target_accuracy": 1.5}, r"target_accuracy=1\.5"),
        ({"head": "tail"}, r"head='tail'"),
    ],
)
def test_a_bad_knob_is_named(config: dict, cause: str):
    with pytest.raises(EarlyExitError, match=cause):
        knobs_from({"method": "self_exit", **config}, None, None, None)


def test_contradictions_are_named():
    with pytest.raises(EarlyExitError, match="given twice"):
        knobs_from({"method": "self_exit", "num_speculative_tokens": 3}, None, None, 4)
    with pytest.raises(EarlyExitError, match="contradict"):
        knobs_from({"method": "ngram"}, None, "[self-exit]", None)


VALUES = st.one_of(st.none(), st.text(), st.integers(), st.floats(), st.booleans())


@given(st.dictionaries(st.text(max_size=12) | st.sampled_from(sorted(Knobs.model_fields)), VALUES))
def test_any_knobs_are_taken_or_refused_in_words(config: dict):
    with contextlib.suppress(EarlyExitError):
        assert isinstance(knobs_from(config | {"method": "self_exit"}, None, None, None), Knobs)


def test_open_knobs_come_from_the_recommendation(model: Path, heads: Path):
    assert resolve(Knobs(model=str(heads)), str(model)) == EarlyExitConfig(
        heads=str(heads),
        exit_layers=(2,),
        num_speculative_tokens=3,
        policy="entropy",
        entropy_thresholds=(1.5,),
        head_shape="mlp 16 5",
    )


def cache_key(config: EarlyExitConfig, **others: int) -> str:
    return AdditionalConfig({**others, CONFIG_KEY: config.to_dict()}).compute_hash()


def test_only_what_shapes_graphs_enters_the_compilation_cache_key(model: Path, heads: Path):
    config = resolve(Knobs(model=str(heads)), str(model))
    same = replace(config, policy="fixed", num_speculative_tokens=7, entropy_thresholds=(), heads="elsewhere")
    assert cache_key(same) == cache_key(config)
    for other in (replace(config, exit_layers=(1,)), replace(config, head_shape="mlp 16 6")):
        assert cache_key(other) != cache_key(config)
    assert cache_key(config, gdn=1) != cache_key(config)


def test_vllm_keeps_the_additional_config_as_it_is(model: Path, heads: Path):
    from vllm.config import VllmConfig

    config = resolve(Knobs(model=str(heads)), str(model))
    held = pickle.loads(pickle.dumps(VllmConfig(additional_config=AdditionalConfig({CONFIG_KEY: config.to_dict()}))))
    assert isinstance(held.additional_config, AdditionalConfig)
    assert EarlyExitConfig(**held.additional_config[CONFIG_KEY]) == config


def test_a_stricter_accuracy_takes_the_next_calibrated_threshold(model: Path, heads: Path):
    assert resolve(Knobs(model=str(heads), target_accuracy=0.8), str(model)).entropy_thresholds == (0.5,)
    with pytest.raises(EarlyExitError, match=r"no entropy threshold reaches target_accuracy 0\.99.*0\.7, 0\.9"):
        resolve(Knobs(model=str(heads), target_accuracy=0.99), str(model))


def test_uncalibrated_heads_draft_a_fixed_length(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    warnings: list[str] = []
    monkeypatch.setattr(config_module.logger, "warning", lambda text, *values: warnings.append(text % values))
    heads = make_heads(tmp_path / "raw", model, calibrated=False)
    config = resolve(Knobs(model=str(heads)), str(model))
    assert (config.policy, config.exit_layers, config.entropy_thresholds) == ("fixed", (1,), ())
    assert len(warnings) == 1
    assert "run 'vllm-earlyexit calibrate'" in warnings[0]
    resolve(Knobs(model=str(heads), policy="fixed"), str(model))
    assert len(warnings) == 1
    with pytest.raises(EarlyExitError, match="not calibrated"):
        resolve(Knobs(model=str(heads), policy="entropy"), str(model))


def test_prompt_lookup_belongs_to_auto(tmp_path: Path, model: Path, heads: Path):
    assert not resolve(Knobs(model=str(heads)), str(model)).prompt_lookup
    for knobs in (Knobs(model=str(heads), prompt_lookup=True), Knobs(head="shared", exit_layer=2, prompt_lookup=True)):
        with pytest.raises(EarlyExitError, match="prompt_lookup belongs to policy='auto'"):
            resolve(knobs, str(model))
    mapped = make_heads(tmp_path / "mapped", model, mapped=True)
    for asked, expected in ((None, True), (True, True), (False, False)):
        config = resolve(Knobs(model=str(mapped), prompt_lookup=asked), str(model))
        assert (config.policy, config.prompt_lookup, config.num_speculative_tokens) == ("auto", expected, 16)


def test_heads_are_found_beside_the_model(model: Path):
    beside = make_heads(model / "self_exit_heads", model)
    assert resolve(Knobs(), str(model)).heads == str(beside)


def test_heads_are_found_through_the_model_config(tmp_path: Path, model: Path):
    make_heads(model / "my-heads", model)
    config = model / "config.json"
    config.write_text(config.read_text()[:-1] + ', "self_exit_heads": "my-heads"}')
    assert resolve(Knobs(), str(model)).heads == str(model / "my-heads")


@pytest.mark.parametrize("named", ["../heads", "/etc", "a/../../heads", 3])
def test_a_model_cannot_name_heads_outside_its_folder(model: Path, named: object):
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"self_exit_heads": named}))
    make_heads(model.parent / "heads", model)
    with pytest.raises(EarlyExitError, match=r"out of the model's folder|must be a path or a Hub id"):
        resolve(Knobs(), str(model))


def test_ids_are_fetched_as_vllm_fetches_them(model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch):
    """From where vLLM keeps its files, and nothing that it would not load."""
    asked = []

    def snapshot_download(name: str, **options: object) -> str:
        asked.append((name, options["revision"], options["cache_dir"], options["allow_patterns"]))
        return str(model if name == "someone/model" else heads)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    resolve(Knobs(model="someone/heads"), "someone/model", "abc", "/data")
    files = ["*.json", "*.safetensors"]
    assert asked == [("someone/model", "abc", "/data", files), ("someone/heads", None, "/data", files)]


def test_offline_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EarlyExitError, match=r"'nobody/nothing' cannot be read .*reachable or cached"):
        resolve(Knobs(), "nobody/nothing")


def test_a_model_without_heads_says_how_to_get_them(model: Path):
    with pytest.raises(EarlyExitError, match="no exit heads come with this model; train them"):
        resolve(Knobs(), str(model))


def test_heads_of_another_model_are_refused(tmp_path: Path, heads: Path):
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(EarlyExitError, match="trained for 'tiny', not for"):
        resolve(Knobs(model=str(heads)), str(other))


@pytest.mark.parametrize("exit_layer", [4, 99])
def test_an_exit_beyond_the_stack_is_refused(model: Path, heads: Path, exit_layer: int):
    with pytest.raises(EarlyExitError, match="beyond the stack; this model has 4 layers, choose 1 to 3"):
        resolve(Knobs(model=str(heads), exit_layer=exit_layer), str(model))


def test_several_exits_are_a_ladder(model: Path, heads: Path):
    config = resolve(Knobs(model=str(heads), policy="entropy", exit_layer=(2, 1)), str(model))
    assert config.exit_layers == (1, 2)
    assert len(config.entropy_thresholds) == 2
    with pytest.raises(EarlyExitError, match="drafts from one exit"):
        resolve(Knobs(model=str(heads), policy="fixed", exit_layer=(1, 2)), str(model))
    with pytest.raises(EarlyExitError, match="beyond the stack"):
        resolve(Knobs(model=str(heads), exit_layer=(1, 4)), str(model))


def test_an_exit_without_a_head_is_refused(model: Path, heads: Path):
    with pytest.raises(EarlyExitError, match="no exit after layer 3; set exit_layer to one of 1, 2"):
        resolve(Knobs(model=str(heads), exit_layer=3), str(model))


def test_the_shared_head_needs_an_exit_layer_and_nothing_else(model: Path):
    config = resolve(Knobs(head="shared", exit_layer=2), str(model))
    assert config == EarlyExitConfig(None, (2,), 4, "fixed")
    with pytest.raises(EarlyExitError, match="needs exit_layer"):
        resolve(Knobs(head="shared"), str(model))
    with pytest.raises(EarlyExitError, match="not calibrated"):
        resolve(Knobs(head="shared", exit_layer=2, policy="entropy"), str(model))


def test_a_model_that_does_not_exist_is_named(tmp_path: Path):
    with pytest.raises(EarlyExitError, match="cannot be read"):
        resolve(Knobs(exit_layer=1), str(tmp_path / "nothing"))
