"""Async scheduling on Model Runner V2: the scheduler does not wait for drafts, and everything else is as if it did.

vLLM turns it off on CPUs; here it is left on.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine import reference
from tests.engine.conftest import adapter_of, counters, engine
from tests.engine.test_early_exit import OPEN
from tests.engine.test_lossless import draft_from_each_exit_in_turn
from tests.engine.test_scheduling import assert_nothing_is_left, chat_ids, metric
from tests.v2.conftest import FIXED
from tests.v2.test_sampling import CHOICE, REGEX, structured
from vllm_earlyexit.engine.ahead import room

TOKENS = 16
answer = partial(reference.answer, max_tokens=TOKENS)


@pytest.fixture
def left_on(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let vLLM schedule asynchronously on CPUs too, if that is what it would do elsewhere; undone by the test."""
    from vllm.platforms.cpu import CpuPlatform

    turn_off = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        chosen = vllm_config.scheduler_config.async_scheduling
        turn_off(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = chosen

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
    return monkeypatch


def is_async(llm: Any) -> bool:
    """Whether an engine schedules the next step before it knows what came of the last one."""
    core = llm.llm_engine.engine_core.engine_core
    scheduler = core.scheduler
    if core.async_scheduling and scheduler.num_spec_tokens:
        tokens = scheduler.scheduler_config.max_num_batched_tokens
        assert scheduler.dynamic_sd_lookup == room(scheduler.num_spec_tokens, tokens, scheduler.max_num_running_reqs)
    return core.async_scheduling and core.batch_queue is not None


@pytest.mark.parametrize("policy", ["fixed", "auto"])
def test_outputs_and_counts_are_those_of_a_scheduler_that_waits(
    smollm2: Path, prompts: list[str], ladder: str, left_on: pytest.MonkeyPatch, policy: str
):
    """Drafts of all lengths, from two exits and copied; in steps that hold too few tokens for everybody's prompt."""
    setting = FIXED if policy == "fixed" else FIXED | {"model": ladder, "policy": policy, "exit_layer": (1, 4)}
    few = sorted(prompts, key=len)[:4]

    def ask() -> tuple[Any, dict[str, int]]:
        with engine(smollm2, speculative_config=setting, max_num_batched_tokens=48) as llm:
            if policy == "auto":
                draft_from_each_exit_in_turn(adapter_of(llm).drafter.policy)
            assert is_async(llm) == ahead
            found = answer(llm, few, 3)
            assert_nothing_is_left(llm)
            return found, counters(llm)

    ahead = True
    found, counted = ask()
    left_on.undo()
    ahead = False
    expected, expected_counts = ask()
    assert found == expected
    assert counted["draft_tokens"] > counted["accepted_tokens"] > 10
    if policy == "fixed":
        assert counted == expected_counts


def test_preempted_requests_start_again(smollm2: Path, prompts: list[str], left_on: pytest.MonkeyPatch):
    tight: dict[str, Any] = {"max_model_len": 256, "block_size": 32, "num_gpu_blocks_override": 10, "max_num_seqs": 4}
    few = sorted(prompts, key=len)[1:8]
    with engine(smollm2, speculative_config=FIXED, **tight) as llm:
        assert is_async(llm)
        found = answer(llm, few, len(few), max_tokens=24)
        assert metric(llm, "num_preemptions") > 0
        assert counters(llm)["accepted_tokens"] > 10
        assert_nothing_is_left(llm)
    with engine(smollm2, max_model_len=256) as llm:
        assert is_async(llm)
        assert found == answer(llm, few, len(few), max_tokens=24)


def test_aborts_leave_nothing_behind(smollm2: Path, prompts: list[str], left_on: pytest.MonkeyPatch):
    few = sorted(prompts, key=len)[:3]
    with engine(smollm2, speculative_config=FIXED, max_num_batched_tokens=48) as llm:
        assert is_async(llm)
        expected, found = answer(llm, few, 1), []
        asked, params = chat_ids(llm, few), SamplingParams(temperature=0, max_tokens=TOKENS)
        for number, prompt in enumerate(asked):
            llm.llm_engine.add_request(f"kept {number}", prompt, params)
            llm.llm_engine.add_request(f"victim {number}", asked[-1 - number], params)
            age = 0
            while llm.llm_engine.has_unfinished_requests():
                if age == 4 * number:
                    llm.llm_engine.abort_request([f"victim {number}"])
                age += 1
                for output in llm.llm_engine.step():
                    if output.finished and output.request_id.startswith("kept"):
                        found.append(list(output.outputs[0].token_ids))
        assert found == expected
        llm.llm_engine.step()
        assert_nothing_is_left(llm)


def test_the_end_of_the_context_and_stops(smollm2: Path, prompts: list[str], left_on: pytest.MonkeyPatch):
    """Steps that were scheduled past an end change nothing."""
    few = sorted(prompts, key=len)[:3]

    def ask(setting: dict[str, Any] | None) -> list[tuple[list[int], str | None]]:
        with engine(smollm2, speculative_config=setting, max_model_len=96) as llm:
            assert is_async(llm)
            asked = chat_ids(llm, few)
            params = [
                SamplingParams(temperature=0, max_tokens=1000),
                SamplingParams(temperature=0, max_tokens=2),
                SamplingParams(temperature=0, max_tokens=20, stop=["the", "a"]),
            ]
            outputs = llm.generate(asked, params, use_tqdm=False)
            if setting:
                assert counters(llm)["accepted_tokens"] > 5
            return [(list(output.outputs[0].token_ids), output.outputs[0].finish_reason) for output in outputs]

    assert ask(FIXED) == ask(None)


def test_structured_outputs_are_those_of_plain_decoding(smollm2: Path, left_on: pytest.MonkeyPatch):
    """The scheduler makes masks for the longest drafts, and sees the drafts themselves before it does."""
    found = []
    for setting in (None, FIXED | {"num_speculative_tokens": 5}):
        with engine(smollm2, speculative_config=setting) as llm:
            assert is_async(llm)
            found.append(structured(llm, [CHOICE, None, REGEX]))
            drafted = counters(llm) if setting else {}
    assert found[0] == found[1]
    assert drafted["accepted_tokens"] > 0


def test_v1_waits_for_drafts_and_so_do_early_exits(smollm2: Path, left_on: pytest.MonkeyPatch):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_earlyexit.engine import seams

    chosen = []
    for runner, setting in (("0", FIXED), ("1", FIXED), ("1", OPEN)):
        left_on.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
        config = EngineArgs(str(smollm2), speculative_config=setting).create_engine_config()
        chosen.append(config.scheduler_config.async_scheduling)
    seams.remove("engine")
    assert chosen == [False, True, False]
