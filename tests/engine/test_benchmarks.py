"""Configurations of the benchmarks that vLLM has no option for: a static depth, and exits that know the answer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.engines import Setup, VLLMEngine, prompt_tokens
from tests.engine.conftest import clean_up
from tests.engine.tiny import add_tokenizer, tiny_model


@contextmanager
def benchmarked(config: str, model: Path) -> Iterator[VLLMEngine]:
    """The engine of a configuration, float32 and eager; gone afterwards."""
    setup = Setup(str(model), None, "float32", False, max_tokens=32, max_num_seqs=4, max_model_len=512)
    engine = VLLMEngine(config, setup)
    try:
        yield engine
    finally:
        engine._llm.llm_engine.engine_core.shutdown()
        del engine
        clean_up()


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_static_depth_is_the_model_without_its_last_layers(architecture: str, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model, prompt = tiny_model(tmp_path / "model", architecture), [5, 6, 7, 8]
    add_tokenizer(model)
    with benchmarked("depth:3", model) as engine:
        (said,) = engine._answers([(prompt, 32)], 1, {})
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, num_hidden_layers=3)
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False)
    assert said == expected[0, len(prompt) :].tolist()
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    others = whole.generate(torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False)
    assert said != others[0, len(prompt) :].tolist()


@pytest.mark.parametrize("fill_in", ["resume", "propagate"])
def test_an_oracle_lets_tokens_leave_where_the_head_is_right(smollm2: Path, prompts: list[str], fill_in: str):
    asked = prompts[:4]
    with benchmarked(f"oracle:{fill_in}", smollm2) as engine:
        run = engine.run(asked, 4)
        tokens = prompt_tokens(engine._llm.get_tokenizer(), asked, 0)
        plain = [engine._plain_outputs[tuple(ids)] for ids in tokens]
    left = run.early
    assert left["early_tokens"] > 5
    assert left["early_tokens"] + left["full_depth_tokens"] == run.tokens - 4, "each prompt gives its first token"
    if fill_in == "resume":
        assert run.outputs == plain
        assert left["agreed_tokens"] == left["checked_tokens"] == left["early_tokens"]
    else:
        assert all(said[0] == first[0] for said, first in zip(run.outputs, plain, strict=True))
