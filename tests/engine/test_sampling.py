"""Every sampling parameter means with self-exit what it means without: same tokens, same log-probabilities."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from tests.engine.conftest import counters, engine
from tests.interpreter import ON_V2

TOKENS = 32
NEWLINE, SPACE_A, SPACE_THE = 198, 253, 260
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= "SELECT " column " FROM " table\ncolumn ::= "id" | "name"\ntable ::= "users" | "items"\n'
ALONE = "logprobs of chosen tokens"
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 7}


class NeverTwiceInARow(AdapterLogitsProcessor):
    """Forbids the newest token, where a request asks for that; it reads the list of generated tokens."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        if not (params.extra_args or {}).get("never_twice"):
            return None

        def forbid(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            if output_ids:
                logits[output_ids[-1]] = -torch.inf
            return logits

        return forbid


def structured(**kind: Any) -> dict[str, Any]:
    return {"structured_outputs": StructuredOutputsParams(**kind)}


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seed": SEEDED,
    "low temperature": SEEDED | {"temperature": 0.3},
    "top-p": SEEDED | {"top_p": 0.8},
    "top-k": SEEDED | {"top_k": 5},
    "min-p": SEEDED | {"min_p": 0.1},
    "top-k, top-p and min-p": SEEDED | {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "repetition penalty": {"repetition_penalty": 1.3},
    "presence and frequency penalties": {"presence_penalty": 0.8, "frequency_penalty": 0.5},
    "penalties, sampled": SEEDED | {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "bad words": {"bad_words": [" the", " a", "of the"]},
    "logit bias": {"logit_bias": {SPACE_THE: -100.0, SPACE_A: 2.0}},
    "allowed tokens": {"allowed_token_ids": list(range(1000))},
    "several choices": SEEDED | {"n": 3},
    "stop string": {"stop": ["\n", "the "], "include_stop_str_in_output": True},
    "stop token": {"stop_token_ids": [NEWLINE, SPACE_THE]},
    "ignore_eos": {"ignore_eos": True, "logit_bias": {2: 12.0}},
    "min_tokens": {"min_tokens": 12, "stop_token_ids": [NEWLINE, SPACE_THE], "logit_bias": {2: 9.0}},
    "max_tokens 1": {"max_tokens": 1},
    "max_tokens 2": {"max_tokens": 2},
    "logprobs": {"logprobs": 4},
    "logprobs, sampled": SEEDED | {"logprobs": 2},
    ALONE: {"logprob_token_ids": [SPACE_A, SPACE_THE]},
    "prompt logprobs": {"prompt_logprobs": 2},
    "custom processor": {"extra_args": {"never_twice": True}, "logit_bias": {SPACE_THE: 8.0}},
    "JSON schema": structured(json=SCHEMA) | {"max_tokens": 64},
    "JSON schema, sampled": SEEDED | structured(json=SCHEMA) | {"max_tokens": 64},
    "regex": structured(regex=r"(Yes|No), because [a-z ]{8,30}\."),
    "grammar": structured(grammar=GRAMMAR),
    "choice": structured(choice=["Positive", "Negative", "Neutral in every respect"]),
}


if ON_V2:  # where custom processors are of another kind
    del CASES["custom processor"]


@dataclass
class Answers:
    """What an engine answered, case by case; and how much it drafted."""

    outputs: dict[str, list[Any]]
    counted: dict[str, int]

    def tokens(self, case: str) -> list[list[int]]:
        return [list(one.token_ids) for output in self.outputs[case] for one in output.outputs]

    def ends(self, case: str) -> list[Any]:
        return [(one.finish_reason, one.stop_reason) for output in self.outputs[case] for one in output.outputs]

    def text(self, case: str) -> list[str]:
        return [one.text for output in self.outputs[case] for one in output.outputs]


def answer(model: Path, prompts: Sequence[str], **arguments: Any) -> Answers:
    """Ask every case about two prompts, all cases in one changing batch, but for one that disturbs its neighbours.

    Plain vLLM gives requests beside one with ``logprob_token_ids`` no log-probabilities (docs/upstream.md).
    """
    processors = None if ON_V2 else [NeverTwiceInARow]
    with engine(model, logits_processors=processors, **arguments) as llm:
        outputs: dict[str, list[Any]] = {}
        for cases in (CASES.keys() - {ALONE}, {ALONE}):
            asked = [(case, prompt) for prompt in prompts for case in CASES if case in cases]
            params = [SamplingParams(**({"temperature": 0, "max_tokens": TOKENS} | CASES[case])) for case, _ in asked]
            messages: list[Any] = [[{"role": "user", "content": prompt}] for _, prompt in asked]
            for (case, _), output in zip(asked, llm.chat(messages, params, use_tqdm=False), strict=True):
                outputs.setdefault(case, []).append(output)
        return Answers(outputs, counters(llm) if arguments else {})


@pytest.fixture(scope="module")
def plain(smollm2: Path, prompts: list[str]) -> Answers:
    return answer(smollm2, prompts[:2])


@pytest.fixture(scope="module", params=["fixed", pytest.param("entropy", marks=pytest.mark.matrix("full"))])
def ours(smollm2: Path, prompts: list[str], request: pytest.FixtureRequest) -> Answers:
    setting = {"method": "self_exit", "policy": request.param, "num_speculative_tokens": 3}
    return answer(smollm2, prompts[:2], speculative_config=setting)


def values(logprobs: dict[int, Any]) -> dict[int, float]:
    return {token: found.logprob for token, found in logprobs.items()}


def test_drafts_were_accepted_and_rejected(ours: Answers):
    assert 100 < ours.counted["accepted_tokens"] < ours.counted["draft_tokens"] - 100


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_plain_decoding(plain: Answers, ours: Answers, case: str):
    assert ours.tokens(case) == plain.tokens(case)
    assert ours.text(case) == plain.text(case)
    assert ours.ends(case) == plain.ends(case)


def test_the_parameters_had_an_effect(plain: Answers):
    """Each case but those that only stop or report differs from greedy decoding, so that ignoring it would show."""
    greedy = plain.tokens("greedy")
    same = {case for case in CASES if plain.tokens(case) == greedy}
    assert same <= {"greedy", "logprobs", ALONE, "prompt logprobs"}


@pytest.mark.parametrize("case", ["logprobs", "logprobs, sampled", ALONE])
def test_log_probabilities_are_those_of_plain_decoding(plain: Answers, ours: Answers, case: str):
    for left, right in zip(plain.outputs[case], ours.outputs[case], strict=True):
        expected, found = left.outputs[0], right.outputs[0]
        assert found.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-3)
        assert len(found.logprobs) == len(expected.logprobs) == len(expected.token_ids)
        for one, other in zip(expected.logprobs, found.logprobs, strict=True):
            assert values(other) == pytest.approx(values(one), abs=1e-3)
            assert {t: lp.rank for t, lp in other.items()} == {t: lp.rank for t, lp in one.items()}


def test_prompt_log_probabilities_are_those_of_plain_decoding(plain: Answers, ours: Answers):
    for left, right in zip(plain.outputs["prompt logprobs"], ours.outputs["prompt logprobs"], strict=True):
        assert len(right.prompt_logprobs) == len(left.prompt_logprobs) > 10
        for one, other in zip(left.prompt_logprobs[1:], right.prompt_logprobs[1:], strict=True):
            assert values(other) == pytest.approx(values(one), abs=1e-3)


def test_structured_outputs_keep_to_their_structure(ours: Answers):
    for case in ("JSON schema", "JSON schema, sampled"):
        for text in ours.text(case):
            found = json.loads(text)
            assert set(found) == {"name", "age"}
            assert isinstance(found["age"], int)
    assert all(re.fullmatch(r"(Yes|No), because [a-z ]{8,30}\.", text) for text in ours.text("regex"))
    assert all(re.fullmatch(r"SELECT (id|name) FROM (users|items)", text) for text in ours.text("grammar"))
    assert set(ours.text("choice")) <= {"Positive", "Negative", "Neutral in every respect"}


@pytest.mark.skipif(ON_V2, reason="V2 has custom processors of its own kind")
def test_custom_processors_see_every_token(ours: Answers):
    for tokens in ours.tokens("custom processor"):
        assert all(one != other for one, other in itertools.pairwise(tokens))


def test_seeds_give_the_same_again_whatever_is_drafted(smollm2: Path, prompts: list[str], plain: Answers):
    """The policy auto drafts as this machine's times tell it to, and copies what repeats."""
    with engine(smollm2, speculative_config={"method": "self_exit"}) as llm:
        params = SamplingParams(max_tokens=TOKENS, **SEEDED)
        messages: list[Any] = [[{"role": "user", "content": prompt}] for prompt in prompts[:2]]
        found = [list(output.outputs[0].token_ids) for output in llm.chat(messages, params, use_tqdm=False)]
    assert found == plain.tokens("seed")
