"""On Model Runner V2, too, sampling parameters mean with self-exit what they mean without: same tokens for a seed.

On a model with few tokens, because Triton's interpreter takes seconds for a sample of SmolLM2's 49,152.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.conftest import adapter_of, counters, engine
from tests.engine.test_early_exit import LOW, OPEN, counts
from tests.engine.test_ranks import recurrent_heads
from tests.engine.test_sampling import SEEDED, Answers, values
from tests.engine.test_statistics import exact_distribution, model, pearson, sample
from tests.engine.tiny import tiny_model

__all__ = ["model"]

TOKENS = 24
PROMPTS = ([5, 6, 7], [40, 41, 42, 43, 44, 5, 6])
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seed": SEEDED,
    "another seed": SEEDED | {"seed": 8},
    "low temperature": SEEDED | {"temperature": 0.3},
    "top-p": SEEDED | {"top_p": 0.5},
    "top-k": SEEDED | {"top_k": 3},
    "min-p": SEEDED | {"min_p": 0.3},
    "top-k, top-p and min-p": SEEDED | {"top_k": 10, "top_p": 0.8, "min_p": 0.05},
    "repetition penalty": {"repetition_penalty": 1.3},
    "presence and frequency penalties": {"presence_penalty": 0.8, "frequency_penalty": 0.5},
    "penalties, sampled": SEEDED | {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "logit bias": {"logit_bias": {5: -100.0, 9: 2.0}},
    "allowed tokens": {"allowed_token_ids": list(range(20))},
    "several choices": SEEDED | {"n": 2},
    "stop token": {"stop_token_ids": list(range(30, 45))},
    "min_tokens": {"min_tokens": 12, "stop_token_ids": list(range(10, 45))},
    "max_tokens 2": {"max_tokens": 2},
    "logprobs": {"logprobs": 4},
    "logprobs, sampled": SEEDED | {"logprobs": 2},
    "prompt logprobs": {"prompt_logprobs": 2},
}
CHOICE: dict[str, Any] = {"choice": ["Positive", "Negative"]}
REGEX: dict[str, Any] = {"regex": r"(Yes|No), because [a-z]{4,8}\."}
REPORT_ONLY = {"logprobs", "prompt logprobs"}
FULL_DEPTH = {"logprobs", "logprobs, sampled", "logit bias", "max_tokens 2", "min_tokens"}
"""Log-probabilities and biases are for the full model; two tokens leave no room, and ``min_tokens`` ends at once."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def answer(tiny: Path, setting: dict[str, Any] | None) -> Answers:
    """Ask every case about every prompt, all in one changing batch."""
    with engine(tiny, skip_tokenizer_init=True, max_model_len=128, speculative_config=setting) as llm:
        asked = [(case, prompt) for prompt in PROMPTS for case in CASES]
        fixed = {"temperature": 0, "max_tokens": TOKENS, "detokenize": False}
        params = [SamplingParams(**(fixed | CASES[case])) for case, _ in asked]
        prompts: list[Any] = [{"prompt_token_ids": prompt} for _, prompt in asked]
        outputs: dict[str, list[Any]] = {}
        for (case, _), output in zip(asked, llm.generate(prompts, params, use_tqdm=False), strict=True):
            outputs.setdefault(case, []).append(output)
        return Answers(outputs, counters(llm) if setting else {})


@pytest.fixture(scope="module")
def plain(tiny: Path) -> Answers:
    return answer(tiny, None)


@pytest.fixture(scope="module")
def ours(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    heads = recurrent_heads(tmp_path_factory.mktemp("heads"), tiny)
    return answer(tiny, {"method": "self_exit", "model": str(heads), "policy": "fixed", "num_speculative_tokens": 3})


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_plain_decoding(plain: Answers, ours: Answers, case: str):
    assert ours.tokens(case) == plain.tokens(case)
    assert ours.ends(case) == plain.ends(case)


def test_the_parameters_had_an_effect_and_drafts_were_accepted_and_rejected(plain: Answers, ours: Answers):
    same = {case for case in CASES if plain.tokens(case) == plain.tokens("greedy")}
    assert same == {"greedy"} | REPORT_ONLY
    assert 50 < ours.counted["accepted_tokens"] < ours.counted["draft_tokens"] - 50


@pytest.mark.parametrize("case", ["logprobs", "logprobs, sampled"])
def test_log_probabilities_are_those_of_plain_decoding(plain: Answers, ours: Answers, case: str):
    for left, right in zip(plain.outputs[case], ours.outputs[case], strict=True):
        pairs = zip(left.outputs[0].logprobs, right.outputs[0].logprobs, strict=True)
        assert all(values(other) == pytest.approx(values(one), abs=1e-3) for one, other in pairs)


def test_sampled_outputs_follow_the_full_model(model: Path):
    seen, counted = sample(model)
    assert 0.1 < counted["accepted_tokens"] / counted["draft_tokens"] < 0.9
    statistic, limit = pearson(seen, exact_distribution(model))
    assert statistic < limit


def without_effect(folder: Path, layers: Sequence[int]) -> Path:
    """Let layers of a model add nothing, so that a head below them says what the model says."""
    weights = load_file(folder / "model.safetensors")
    for layer in layers:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{name}.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_head_that_is_right_drafts_what_will_be_sampled(tmp_path: Path):
    folder = without_effect(tiny_model(tmp_path / "model", layers=2), [1])
    setting = {"method": "self_exit", "head": "shared", "exit_layer": 1, "num_speculative_tokens": 3}
    params = [
        SamplingParams(temperature=temperature, seed=seed, max_tokens=TOKENS, detokenize=False)
        for temperature, seed in ((0.0, None), (0.6, 1), (1.0, 2), (1.0, None), (1.5, 3))
    ]
    prompts: list[Any] = [{"prompt_token_ids": PROMPTS[0]}] * len(params)
    rates, answers = {}, []
    for method, looks_ahead in (("probabilistic", False), ("probabilistic", True), ("greedy", False)):
        asked = setting | {"draft_sample_method": method}
        with engine(folder, skip_tokenizer_init=True, max_model_len=128, speculative_config=asked) as llm:
            adapter_of(llm).drafter.looks_ahead = looks_ahead
            outputs = llm.generate(prompts, params, use_tqdm=False)
            answers.append([output.outputs[0].token_ids for output in outputs if output.request_id != "3"])
            rates[method, looks_ahead] = counters(llm)["accepted_tokens"] / counters(llm)["draft_tokens"]
    assert rates["probabilistic", False] == rates["probabilistic", True] == 1
    assert rates["greedy", False] < 0.8
    assert answers[0] == answers[1] == answers[2]


def test_what_leaves_is_sampled_with_all_parameters(tmp_path: Path):
    """From a head that is right, with the random numbers of the full model: early tokens are plain decoding's."""
    folder = without_effect(tiny_model(tmp_path / "model"), [2, 3])
    heads = recurrent_heads(tmp_path / "heads", folder, shared=True)
    early = {"policy": "entropy", "mode": "early_exit", "early_exit_accuracy": 0.6, "fill_in": "propagate"}
    plain, ours = answer(folder, None), answer(folder, {"method": "self_exit", "model": str(heads)} | early)
    assert {case: ours.tokens(case) for case in CASES} == {case: plain.tokens(case) for case in CASES}
    left = {case: sum(map(tokens_left, ours.outputs[case])) for case in CASES}
    assert {case for case, count in left.items() if not count} == FULL_DEPTH, left


def tokens_left(output: Any) -> int:
    """How many of a request's tokens have left early."""
    said = (output.kv_transfer_params or {}).get("self_exit", {})
    return sum(count for layer, count in said.get("tokens_per_exit", {}).items() if layer == "2")


def structured(llm: Any, kinds: Sequence[dict[str, Any] | None], extra_args: dict[str, Any] | None = None) -> list[str]:
    """Ask one question, each time for an answer of another structure, or of none; return the answers."""
    asked: list[Any] = [[{"role": "user", "content": "Is the sky blue?"}]] * len(kinds)
    each = [kind and StructuredOutputsParams(**kind) for kind in kinds]
    fixed: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_args": extra_args}
    params = [SamplingParams(**fixed, structured_outputs=structure) for structure in each]
    return [output.outputs[0].text for output in llm.chat(asked, params, use_tqdm=False)]


def test_structured_outputs_are_those_of_plain_decoding(smollm2: Path):
    found = []
    for setting in (None, {"method": "self_exit", "policy": "fixed", "num_speculative_tokens": 3}):
        with engine(smollm2, speculative_config=setting) as llm:
            found.append(structured(llm, [CHOICE, REGEX]))
            drafted = counters(llm) if setting else {}
    assert found[0] == found[1]
    assert drafted["accepted_tokens"] > 0


def test_structured_outputs_that_leave_stay_valid(smollm2: Path):
    with engine(smollm2, speculative_config=OPEN) as llm:
        chosen, said = structured(llm, [CHOICE, REGEX], LOW)
        assert counts(llm)["early_tokens"] > 0
    assert chosen in CHOICE["choice"]
    assert re.fullmatch(REGEX["regex"], said), said
