"""LoRA adapters: several in one batch, drafted for by a head that was trained on the base model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.engine.conftest import counters, engine
from vllm_earlyexit.heads.fingerprint import text_config

RANK = 8


def adapter(folder: Path, model: Path, seed: int) -> Path:
    """Write random adapters of all layers, strong enough to change what the model says."""
    config, made = text_config(model), torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.v_proj": (hidden, kv), "mlp.down_proj": (inner, hidden)}
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in sizes.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(RANK, inputs, generator=made) * inputs**-0.5
            weights[f"{at}.lora_B.weight"] = torch.randn(outputs, RANK, generator=made) * 0.1
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    targets = [name.split(".")[1] for name in sizes]
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest | None]:
    folder = tmp_path_factory.mktemp("lora")
    made = [LoRARequest(f"a{n}", n, str(adapter(folder / f"a{n}", smollm2, seed=n))) for n in (1, 2)]
    return [None, *made]


def answers(
    model: Path, prompts: list[str], adapters: list[Any], **arguments: Any
) -> tuple[list[list[int]], dict[str, int]]:
    """Ask every adapter every prompt, all in one batch that prompts join in chunks."""
    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
    with engine(model, max_num_batched_tokens=64, **lora, **arguments) as llm:
        messages: list[Any] = [[{"role": "user", "content": prompt}] for prompt in prompts for _ in adapters]
        params = SamplingParams(temperature=0, max_tokens=32)
        outputs = llm.chat(messages, params, use_tqdm=False, lora_request=adapters * len(prompts))
        return [list(output.outputs[0].token_ids) for output in outputs], counters(llm)


def test_each_request_gets_the_answer_of_its_adapter(
    smollm2: Path, prompts: list[str], adapters: list[Any], ladder: str
):
    expected, _ = answers(smollm2, prompts[:4], adapters)
    base, first, second = expected[::3], expected[1::3], expected[2::3]
    assert base != first != second != base, "adapters must change something"
    fixed = {"method": "self_exit", "policy": "fixed", "num_speculative_tokens": 3}
    laddered = {
        "method": "self_exit",
        "policy": "entropy",
        "model": ladder,
        "target_accuracy": 0.6,
        "exit_layer": (1, 4),
    }
    for setting in (fixed, laddered):
        found, counted = answers(smollm2, prompts[:4], adapters, speculative_config=setting)
        assert found == expected
        assert counted["draft_tokens"] > counted["accepted_tokens"] > 50
