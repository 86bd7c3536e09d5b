"""What is known of CUDA graphs without a GPU: see tests/v2/graphs.py."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils, model_runner

from tests.engine import reference
from tests.engine.conftest import counters, engine, runner_of
from tests.engine.test_early_exit import LOW, PROPAGATING, ask, counts
from tests.engine.test_lossless import draft_from_each_exit_in_turn
from tests.v2.graphs import SIZES, RecordedGraph, captured
from vllm_earlyexit.engine.sizes import Passes

answer = partial(reference.answer, max_tokens=16)
FULL, PIECEWISE, NONE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE


@pytest.fixture(scope="module")
def few(prompts: list[str]) -> list[str]:
    return sorted(prompts, key=len)[:5]


def setting_of(ladder: str, policy: str) -> dict[str, Any]:
    setting = {"method": "self_exit", "model": ladder, "policy": policy, "num_speculative_tokens": 3}
    return setting | {"exit_layer": 4 if policy == "fixed" else (1, 4)}


@pytest.mark.parametrize("policy", ["fixed", "auto"])
def test_drafts_and_resumed_verification_replay_what_vllm_has_captured(
    smollm2: Path, few: list[str], ladder: str, policy: str
):
    """Five requests at a time, then one: no size but one is captured as it is."""
    with engine(smollm2, speculative_config=setting_of(ladder, policy)) as llm:
        if policy == "auto":
            draft_from_each_exit_in_turn(runner_of(llm).speculator.drafter.policy)
        expected, counted = [answer(llm, few, 5), answer(llm, few[:1], 1)], counters(llm)
    with engine(smollm2, speculative_config=setting_of(ladder, policy)) as llm, captured(runner_of(llm)) as wrappers:
        if policy == "auto":
            draft_from_each_exit_in_turn(runner_of(llm).speculator.drafter.policy)
        assert [len(one.concrete_cudagraph_entries) for one in wrappers] == [len(SIZES)] * len(wrappers)
        assert RecordedGraph.replays == 0
        found = [answer(llm, few, 5), answer(llm, few[:1], 1)]
        assert RecordedGraph.replays > 100
        assert [len(one.concrete_cudagraph_entries) for one in wrappers] == [len(SIZES)] * len(wrappers)
        assert found == expected
        assert counters(llm) == counted
        assert counted["accepted_tokens"] > 10


def test_fill_in_replays_what_was_captured(smollm2: Path, few: list[str]):
    def answers(llm: Any) -> list[list[int]]:
        return ask(llm, few[:3], [LOW] * 3, max_tokens=16)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("fill-in ran outside graphs")

    with engine(smollm2, speculative_config=PROPAGATING) as llm:
        expected, counted = answers(llm), dict(counts(llm))
    with engine(smollm2, speculative_config=PROPAGATING) as llm, captured(runner_of(llm)) as wrappers:
        assert len(wrappers) == 4  # two segments, a head, fill-in
        wrappers[-1].runnable = never
        assert answers(llm) == expected
        assert dict(counts(llm)) == counted
        assert counted["early_tokens"] > 5


def test_what_stands_for_graphs_reads_the_memory_that_it_was_captured_over(
    smollm2: Path, few: list[str], ladder: str, monkeypatch: pytest.MonkeyPatch
):
    """The test above can fail: here inputs stay where they are, and heads draft from what was there before."""
    with engine(smollm2, speculative_config=setting_of(ladder, "fixed")) as llm:
        expected, counted = answer(llm, few[:1], 1), counters(llm)
    with engine(smollm2, speculative_config=setting_of(ladder, "fixed")) as llm, captured(runner_of(llm)):
        monkeypatch.setattr(Passes, "_held", lambda self, inputs, size: inputs)
        assert answer(llm, few[:1], 1) != expected or counters(llm) != counted


def test_whole_steps_are_captured_for_plain_decoding_and_others_run_piecewise(smollm2: Path):
    setting = {"method": "self_exit", "policy": "fixed", "num_speculative_tokens": 3}
    with engine(smollm2, speculative_config=setting) as llm, captured(runner_of(llm)):
        runner = runner_of(llm)
        both = CUDAGraphMode.FULL_AND_PIECEWISE
        manager = model_runner.ModelCudaGraphManager(runner.vllm_config, torch.device("cpu"), both, 4)
        assert isinstance(manager, cudagraph_utils.ModelCudaGraphManager)
        manager._graphs_captured = True

        def dispatched(num_reqs: int, num_tokens: int, uniform: int | None) -> tuple[CUDAGraphMode, int]:
            found = manager.dispatch(num_reqs, num_tokens, uniform, 0, max_query_len=uniform)
            return found.cg_mode, found.num_tokens

        assert dispatched(5, 5, 1) == (FULL, 8)  # nobody has a draft
        assert dispatched(5, 20, 4) == (PIECEWISE, 32)  # drafts of full length
        assert dispatched(5, 11, None) == (PIECEWISE, 16)
        assert dispatched(5, 40, None) == (NONE, 40)
        assert [runner.speculator._captured_size(count) for count in (1, 3, 32, 33)] == [1, 4, 32, None]
