"""What vLLM can do with a model, it does with self-exit: the same answers, or a refusal at start in one sentence."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from tests.engine.conftest import counters, engine, runner_of
from tests.engine.tiny import tiny_model
from vllm_earlyexit.heads.checkpoint import as_int8

FIXED = {"method": "self_exit", "policy": "fixed", "num_speculative_tokens": 3}
SHARED = FIXED | {"head": "shared", "exit_layer": 2}
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False)


def ask(model: Path, ids: list[list[int]], **arguments: Any) -> tuple[list[list[int]], dict[str, int]]:
    """Answer prompts of tokens, in one batch."""
    with engine(model, skip_tokenizer_init=True, **arguments) as llm:
        outputs = llm.generate([{"prompt_token_ids": one} for one in ids], GREEDY, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs], counters(llm)


def assert_same(model: Path, ids: list[list[int]], setting: dict[str, Any], **arguments: Any) -> None:
    expected, _ = ask(model, ids, **arguments)
    found, counted = ask(model, ids, speculative_config=setting, **arguments)
    assert found == expected
    assert counted["draft_tokens"] > counted["accepted_tokens"] > 0


def silent_tokens(llm: Any) -> int:
    """What the metrics page shows of heads that say nothing, all engines of this process together."""
    (metric,) = (m for m in llm.get_metrics() if m.name == "vllm:self_exit_silent_tokens")
    return metric.value


@pytest.fixture(scope="module")
def random_ids() -> list[list[int]]:
    made = torch.Generator().manual_seed(0)
    return [torch.randint(0, 64, (length,), generator=made).tolist() for length in (3, 17, 40, 90)]


@pytest.fixture(scope="module")
def text_ids(smollm2: Path, prompts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [tokenizer(prompt).input_ids[:60] for prompt in prompts[:4]]


def int8_model(folder: Path, source: Path) -> Path:
    """Write a copy of a model with int8 weights and activations, as compressed-tensors stores them."""
    shutil.copytree(source, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = {}
    for name, weight in load_file(file).items():
        if re.search(r"_proj\.weight$", name):
            tensors[name], scale = as_int8(weight)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": int8 | {"strategy": "channel", "dynamic": False},
        "input_activations": int8 | {"strategy": "token", "dynamic": True},
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_architectures(tmp_path: Path, random_ids: list[list[int]], architecture: str, tied: bool):
    assert_same(tiny_model(tmp_path / "model", architecture, tied=tied), random_ids, SHARED)


def test_sliding_windows(tmp_path: Path, random_ids: list[list[int]]):
    """A window of 16 tokens in every layer, which is the only kind that vLLM knows of this architecture."""
    model = tiny_model(tmp_path / "model", "qwen2")
    before, _ = ask(model, random_ids)
    config = json.loads((model / "config.json").read_text())
    del config["layer_types"]
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    (model / "config.json").write_text(json.dumps(config | window))
    assert ask(model, random_ids)[0] != before
    assert_same(model, random_ids, SHARED)


def test_hf_overrides(smollm2: Path, text_ids: list[list[int]]):
    overrides = {"rope_parameters": {"rope_type": "default", "rope_theta": 40_000.0}}
    before, _ = ask(smollm2, text_ids)
    assert_same(smollm2, text_ids, FIXED, hf_overrides=overrides)
    assert ask(smollm2, text_ids, hf_overrides=overrides)[0] != before


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int8 weights"])
def test_coarse_numbers_serve_and_hardly_differ(tmp_path: Path, smollm2: Path, text_ids: list[list[int]], kind: str):
    """Roundings depend on how many tokens a step has, in plain vLLM too, so that texts may part at near ties."""
    model, setting, arguments = smollm2, FIXED, {"dtype": kind}
    if kind == "int8 weights":
        model, setting = int8_model(tmp_path / "int8", smollm2), SHARED | {"exit_layer": 20}
        arguments = {"dtype": "bfloat16"}  # vLLM's kernels for CPUs with AMX know no float32 here
    expected, _ = ask(model, text_ids, **arguments)
    found, counted = ask(model, text_ids, speculative_config=setting, **arguments)
    pairs = zip(expected, found, strict=True)
    same = [next((n for n, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x)) for x, y in pairs]
    assert sum(same) > 64, "texts part early"
    assert counted["accepted_tokens"] > 10


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's FP8 KV cache on CPUs needs AVX-512 or AMX")
def test_fp8_kv_cache(smollm2: Path, text_ids: list[list[int]]):
    found, counted = ask(smollm2, text_ids, dtype="bfloat16", kv_cache_dtype="fp8", speculative_config=FIXED)
    assert [len(one) for one in found] == [32] * len(text_ids)
    assert counted["accepted_tokens"] > 20


def test_a_head_that_breaks_stops_drafting_and_nothing_else(smollm2: Path, text_ids: list[list[int]]):
    prompts: list[Any] = [{"prompt_token_ids": one} for one in text_ids]
    expected, _ = ask(smollm2, text_ids)
    with engine(smollm2, skip_tokenizer_init=True, speculative_config=FIXED) as llm:
        drafter, counted = runner_of(llm).drafter.drafter, silent_tokens(llm)
        assert [list(o.outputs[0].token_ids) for o in llm.generate(prompts, GREEDY, use_tqdm=False)] == expected
        drafted = counters(llm)["draft_tokens"]
        for parameter in drafter.exits[0].head.exit._module.parameters():
            parameter.fill_(torch.nan)
        for _ in range(2):
            assert [list(o.outputs[0].token_ids) for o in llm.generate(prompts, GREEDY, use_tqdm=False)] == expected
        assert counters(llm)["draft_tokens"] == drafted > 0
        assert 64 <= drafter.silent < 64 + len(text_ids)
        assert silent_tokens(llm) == counted + drafter.silent
