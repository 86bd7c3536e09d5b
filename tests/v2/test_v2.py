"""What holds on Model Runner V1 holds on V2; see tests/interpreter.py for how that runs here, and ``make test-v2``."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from benchmarks.near_ties import NearTies
from tests.engine import reference
from tests.engine.conftest import adapter_of, counters, engine, runner_of
from tests.engine.test_early_exit import LOW, OPEN, PROPAGATING, ask, counts, exits, responses
from tests.engine.test_kv import Fed
from tests.engine.test_lossless import draft_from_each_exit_in_turn
from tests.engine.test_patched import run
from tests.engine.test_scheduling import NOISE, assert_nothing_is_left, cached_blocks, chat_ids, metric
from tests.patched import patched_copy
from vllm_earlyexit.engine import seams
from vllm_earlyexit.engine.early_exit import MODE
from vllm_earlyexit.engine.runner_v2 import SelfExitSpeculator

ROOT = Path(__file__).parents[2]
PROMPTS, TOKENS = 12, 32
FIXED = {"method": "self_exit", "policy": "fixed", "num_speculative_tokens": 3}
LORA = {"speculative_config": FIXED, "enable_lora": True, "max_lora_rank": 8}
Answers = list[list[int]]
answer = partial(reference.answer, max_tokens=TOKENS)


@pytest.fixture
def on_v1(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """For tests that also want Model Runner V1: what to undo."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    return monkeypatch


class Judge:
    """Plain V2's answers; a difference is excused only where the full model hardly prefers one token."""

    def __init__(self, model: Path, prompts: list[str]):
        self.prompts, self._near_ties = prompts, NearTies(model)
        with engine(model) as llm:
            assert hasattr(runner_of(llm), "speculator")
            self.answers = answer(llm, prompts, 4)

    def check(self, found: Answers) -> None:
        assert len(found) <= len(self.answers)
        differ = [n for n, tokens in enumerate(found) if tokens != self.answers[n]]
        assert len(differ) <= 1
        assert all(self._near_ties.excuses(self.prompts[n], self.answers[n], found[n]) for n in differ)


@pytest.fixture(scope="module")
def plain(smollm2: Path, prompts: list[str]) -> Judge:
    return Judge(smollm2, prompts[:PROMPTS])


def test_a_little_of_everything(smollm2: Path, prompts: list[str], on_v1: pytest.MonkeyPatch):
    """Short enough for every run of the tests: outputs are plain V2's, counts are those of the V1 adapter."""
    few = sorted(prompts, key=len)[:4]
    with engine(smollm2, speculative_config=FIXED) as llm:
        found_on_v1, counted_on_v1 = answer(llm, few, 4, max_tokens=16), counters(llm)
        assert not isinstance(adapter_of(llm), SelfExitSpeculator)
    on_v1.undo()
    with engine(smollm2) as llm:
        expected = answer(llm, few, 4, max_tokens=16)
    with engine(smollm2, speculative_config=FIXED, max_num_batched_tokens=32) as llm:
        assert isinstance(adapter_of(llm), SelfExitSpeculator)
        assert answer(llm, few, 4, max_tokens=16) == expected == found_on_v1
        assert counters(llm)["accepted_tokens"] == counted_on_v1["accepted_tokens"] > 0
        assert_nothing_is_left(llm)


@pytest.mark.parametrize("batch_size", [4, 1])
def test_greedy_outputs_are_plain_v2s_and_counts_are_v1s(
    smollm2: Path, plain: Judge, on_v1: pytest.MonkeyPatch, batch_size: int
):
    with engine(smollm2, speculative_config=FIXED) as llm:
        found_on_v1, counted_on_v1 = answer(llm, plain.prompts, batch_size), counters(llm)
    on_v1.undo()
    with engine(smollm2, speculative_config=FIXED) as llm:
        found = answer(llm, plain.prompts, batch_size)
        plain.check(found)
        assert found == found_on_v1
        assert counters(llm) == counted_on_v1
        assert counted_on_v1["draft_tokens"] > counted_on_v1["accepted_tokens"] > 50


@pytest.mark.parametrize("policy", ["entropy", "auto"])
def test_other_policies(smollm2: Path, plain: Judge, ladder: str, policy: str):
    """From a ladder of exits; ``auto`` copies what repeats, too."""
    setting = {"method": "self_exit", "model": ladder, "policy": policy, "num_speculative_tokens": 4}
    with engine(smollm2, speculative_config=setting | {"exit_layer": (1, 4)}) as llm:
        if policy == "auto":
            draft_from_each_exit_in_turn(adapter_of(llm).drafter.policy)
        plain.check(answer(llm, plain.prompts, 4))
        assert counters(llm)["draft_tokens"] > counters(llm)["accepted_tokens"] > 0


@pytest.mark.parametrize("policy", ["fixed", "auto"])
def test_looking_only_now_and_then(smollm2: Path, plain: Judge, ladder: str, policy: str):
    """As on GPUs, several draft steps are run before their tokens are looked at."""
    setting = {"method": "self_exit", "model": ladder, "policy": policy, "num_speculative_tokens": 4}
    with engine(smollm2, speculative_config=setting | {"exit_layer": 4 if policy == "fixed" else (1, 4)}) as llm:
        drafter = adapter_of(llm).drafter
        drafter.looks_ahead = True
        if policy == "auto":
            draft_from_each_exit_in_turn(drafter.policy)
        plain.check(answer(llm, plain.prompts[:4], 4))
        assert counters(llm)["draft_tokens"] > counters(llm)["accepted_tokens"] > 0


def test_what_gpus_warm_up_with_leaves_nothing_behind(smollm2: Path, plain: Judge):
    """vLLM's GPU worker runs made-up batches with drafts that nobody made; the CPU's does not."""
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    with engine(smollm2, speculative_config=FIXED) as llm:
        runner = runner_of(llm)
        warmup_kernels(runner, runner.execute_model, runner.sample_tokens)
        plain.check(answer(llm, plain.prompts[:4], 4))
        assert counters(llm)["accepted_tokens"] > 10
        assert_nothing_is_left(llm)


def test_nothing_is_computed_twice(smollm2: Path, plain: Judge, monkeypatch: pytest.MonkeyPatch):
    prompts = plain.prompts[:4]
    with engine(smollm2, speculative_config=FIXED, enable_prefix_caching=False, max_num_batched_tokens=40) as llm:
        fed, params = Fed(monkeypatch), SamplingParams(temperature=0, max_tokens=TOKENS)
        outputs = llm.generate(chat_ids(llm, prompts), params, use_tqdm=False)
        plain.check([list(output.outputs[0].token_ids) for output in outputs])
        counted = counters(llm)
    verified = sum(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) - 1 for o in outputs)
    rejected = counted["draft_tokens"] - counted["accepted_tokens"]
    assert len(fed.tokens) == 2
    for count in fed.tokens.values():  # tokens accepted past the end of an answer are verified and thrown away
        assert verified + rejected <= count <= verified + rejected + 3 * len(prompts)
    assert len(set(fed.tokens.values())) == 1


def test_cached_blocks_hold_what_plain_v2_puts_there(smollm2: Path, plain: Judge, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    expected = cached_blocks(smollm2, plain.prompts[:6])
    found = cached_blocks(smollm2, plain.prompts[:6], speculative_config=FIXED)
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for key, block in expected.items():
        assert (found[key] - block).abs().max() < NOISE


def test_preempted_requests_start_again(smollm2: Path, plain: Judge):
    tight: dict[str, Any] = {"max_model_len": 256, "block_size": 32, "num_gpu_blocks_override": 10}
    with engine(smollm2, speculative_config=FIXED, max_num_seqs=4, **tight) as llm:
        plain.check(answer(llm, plain.prompts, len(plain.prompts)))
        assert metric(llm, "num_preemptions") > 2
        assert counters(llm)["accepted_tokens"] > 50
        assert_nothing_is_left(llm)


def test_aborts_at_every_phase(smollm2: Path, plain: Judge):
    """A victim beside every request, aborted after 0, 1, 2, … steps."""
    with engine(smollm2, speculative_config=FIXED, max_num_batched_tokens=48) as llm:
        asked, params = chat_ids(llm, plain.prompts), SamplingParams(temperature=0, max_tokens=TOKENS)
        found = []
        for number, prompt in enumerate(asked):
            llm.llm_engine.add_request(f"kept {number}", prompt, params)
            llm.llm_engine.add_request(f"victim {number}", asked[-1 - number], params)
            age = 0
            while llm.llm_engine.has_unfinished_requests():
                if age == number:
                    llm.llm_engine.abort_request([f"victim {number}"])
                age += 1
                for output in llm.llm_engine.step():
                    if output.finished and output.request_id.startswith("kept"):
                        found.append(list(output.outputs[0].token_ids))
        plain.check(found)
        assert counters(llm)["accepted_tokens"] > 50
        llm.llm_engine.step()
        assert_nothing_is_left(llm)


@pytest.mark.parametrize("setting", [OPEN, PROPAGATING], ids=["resume", "propagate"])
def test_early_exits_are_those_of_v1(smollm2: Path, plain: Judge, on_v1: pytest.MonkeyPatch, setting: dict[str, Any]):
    """Beside requests that did not ask for them and decode as plain V2 does."""
    prompts, asked = plain.prompts[:4], [None, LOW, {MODE: "off"}, LOW]
    with engine(smollm2, speculative_config=setting) as llm:
        on_v1_said, counted_on_v1 = responses(llm, prompts, asked, max_tokens=TOKENS), dict(counts(llm))
    on_v1.undo()
    with engine(smollm2, speculative_config=setting) as llm:
        said = responses(llm, prompts, asked, max_tokens=TOKENS)
        found = [list(output.outputs[0].token_ids) for output in said]
        assert found == [list(output.outputs[0].token_ids) for output in on_v1_said]
        assert exits(said) == exits(on_v1_said)
        assert [one is not None for one in exits(said)] == [False, True, False, True]
        assert dict(counts(llm)) == counted_on_v1
        assert counted_on_v1["early_tokens"] > 20
        plain.check([found[0], plain.answers[1], found[2], plain.answers[3]])
        sampled = ask(llm, prompts[:1], [LOW], max_tokens=8, temperature=1.0, seed=1)
        assert sampled == ask(llm, prompts[:1], [{MODE: "off"}], max_tokens=8, temperature=1.0, seed=1)


def test_lora_is_refused_and_left_to_v1(smollm2: Path, monkeypatch: pytest.MonkeyPatch):
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match="does not yet support: self-exit with LoRA adapters"), engine(smollm2, **LORA):
        pass
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    chosen = {}
    for lora in (False, True):
        args = EngineArgs(str(smollm2), speculative_config=FIXED, enable_lora=lora)
        chosen[lora] = args.create_engine_config().use_v2_model_runner
    seams.remove("engine")
    assert chosen == {False: True, True: False}


def test_a_patched_vllm_needs_no_seams(tmp_path: Path):
    """Engines of these tests assert that no seam is applied where vLLM is patched."""
    environment = os.environ | {"PYTHONPATH": f"{patched_copy(tmp_path)}{os.pathsep}{ROOT}"}
    chosen = ("-q", "-p", "no:cacheprovider", "tests/v2", "-k", "a_little_of_everything")
    run(environment, "-m", "pytest", *chosen)
