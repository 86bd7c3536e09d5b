"""Greedy outputs of self-exit vLLM are those of plain vLLM, token for token."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.conftest import counters, engine, runner_of
from tests.engine.heads import LADDER, random_heads
from tests.engine.reference import FEW, Reference, answer
from vllm_earlyexit.engine.cost import StepTimes
from vllm_earlyexit.engine.lookup import Repeat
from vllm_earlyexit.engine.policy import Copy

CHEAP = StepTimes((1, 8), (1e-3, 1e-3), (1e-3, 1e-3), (50e-3, 51e-3), (51e-3, 52e-3))
EXCUSES = 1 / 50
FULL = pytest.mark.matrix("full")
SETTINGS = [
    *(("fixed", length) for length in (1, 3, 8)),
    *(pytest.param("entropy", length, marks=() if length == 3 else FULL) for length in (1, 3, 8)),
    ("auto", 4),
]


def draft_from_each_exit_in_turn(policy: Any) -> None:
    """Make ``auto`` draft whatever this machine's times are."""
    begin, exits = policy.begin, itertools.cycle(range(len(policy.times)))
    assert len(policy.times) > 1
    policy.times = [CHEAP] * len(policy.times)
    policy._clock = lambda: 0.0  # so that it never learns that drafting is slow here

    def begin_elsewhere(*arguments: Any) -> bool:
        drafts = begin(*arguments)
        policy.exit = next(exits)
        return drafts

    policy.begin = begin_elsewhere


@pytest.mark.parametrize(("policy", "length"), SETTINGS)
def test_greedy_outputs_are_identical(
    smollm2: Path, plain: Reference, ladder: str, policy: str, length: int, matrix: str
):
    setting = {"method": "self_exit", "policy": policy, "num_speculative_tokens": length}
    if policy == "auto":
        setting["model"] = ladder
    with engine(smollm2, speculative_config=setting) as llm:
        if policy == "auto":
            draft_from_each_exit_in_turn(runner_of(llm).drafter.drafter.policy)
        plain.check_all(llm, alone=None if matrix == "full" else FEW)
        counted = counters(llm)
    assert counted["accepted_tokens"] > 0, "nothing was accepted, so nothing was shown"
    assert counted["draft_tokens"] > counted["accepted_tokens"], "nothing was rejected, so nothing was shown"
    if policy == "fixed" and length > 1:
        assert counted["draft_tokens"] > 2 * counted["drafts"]


def test_a_ladder_of_exits_changes_nothing(smollm2: Path, plain: Reference, ladder: str):
    """Tokens that are unsure at the first exit are taken on to the second one with all that is pending."""
    setting = {"method": "self_exit", "model": ladder, "policy": "entropy", "num_speculative_tokens": 4}
    with engine(smollm2, speculative_config=setting | {"target_accuracy": 0.8, "exit_layer": LADDER}) as llm:
        drafter = runner_of(llm).drafter.drafter
        lifted, lift = 0, drafter._lift

        def counting(*arguments: Any) -> Any:
            nonlocal lifted
            lifted += 1
            return lift(*arguments)

        drafter._lift = counting
        plain.check_all(llm, alone=FEW)
        assert counters(llm)["accepted_tokens"] > 0
    assert lifted > 100


def test_copying_what_repeats_changes_nothing(smollm2: Path, plain: Reference, ladder: str):
    """Whatever that is worth, sequences are copied beside others that are drafted for, and behind what was drafted."""
    setting = {"method": "self_exit", "model": ladder, "policy": "auto"}
    with engine(smollm2, speculative_config=setting) as llm:
        policy = runner_of(llm).drafter.drafter.policy
        draft_from_each_exit_in_turn(policy)
        copied: list[Copy] = []

        def copy_all(repeats: Sequence[Repeat], reached: np.ndarray, **others: float) -> dict[int, Copy]:
            found = {
                row: Copy(repeat.length, len(repeat.tokens), len(policy._drafted.get(row, [])))
                for row, repeat in enumerate(repeats)
                if repeat.tokens
            }
            copied.extend(found.values())
            return found

        policy._worth_copying = copy_all
        plain.check_all(llm, alone=FEW)
        counted = counters(llm)
    assert len(copied) > 100
    assert sum(copy.behind > 0 for copy in copied) > 20
    assert 0 < counted["accepted_tokens"] < counted["draft_tokens"]
    assert counted["drafts"] > len(copied), "heads drafted as well"


@pytest.mark.parametrize("policy", [pytest.param("fixed", marks=FULL), "auto"])
def test_looking_only_now_and_then_changes_nothing(smollm2: Path, plain: Reference, ladder: str, policy: str):
    """As on GPUs, where a look waits for the device: several draft steps are run before one."""
    setting = {"method": "self_exit", "model": ladder, "policy": policy, "num_speculative_tokens": 4}
    with engine(smollm2, speculative_config=setting | ({"exit_layer": 4} if policy == "fixed" else {})) as llm:
        drafter = runner_of(llm).drafter.drafter
        drafter.looks_ahead = True
        if policy == "auto":
            draft_from_each_exit_in_turn(drafter.policy)
        ran, look = list[int](), drafter._look

        def counting(*arguments: Any) -> bool:
            ran.append(len(arguments[-1]))
            return look(*arguments)

        drafter._look = counting
        plain.check_all(llm, alone=FEW)
        counted = counters(llm)
    assert 0 < counted["accepted_tokens"] < counted["draft_tokens"]
    assert sum(ran) > 2 * len(ran) > 100


@pytest.mark.parametrize(
    ("policy", "budget", "caching"),
    [
        ("fixed", 48, False),
        *(
            pytest.param(*rest, marks=FULL)
            for rest in itertools.product(("fixed", "entropy"), (16, 100), (False, True))
        ),
    ],
)
def test_prompts_in_chunks_with_and_without_prefix_cache(
    smollm2: Path, plain: Reference, policy: str, budget: int, caching: bool
):
    setting = {"method": "self_exit", "policy": policy, "num_speculative_tokens": 3}
    chunks = {"max_num_batched_tokens": budget, "enable_prefix_caching": caching}
    with engine(smollm2, speculative_config=setting, **chunks) as llm:
        plain.check(answer(llm, plain.prompts, 8), 8)
        assert counters(llm)["accepted_tokens"] > 0


@FULL
@pytest.mark.parametrize("policy", ["fixed", "entropy", "auto"])
def test_compiled_models(smollm2: Path, plain: Reference, ladder: str, policy: str):
    """Segments and heads are compiled; plain vLLM stays eager, which in float32 hardly matters."""
    setting = {
        "method": "self_exit",
        "policy": policy,
        "model": ladder,
        "exit_layer": LADDER if policy == "auto" else 4,
    }
    with engine(smollm2, speculative_config=setting | {"num_speculative_tokens": 3}, enforce_eager=False) as llm:
        if policy == "auto":
            draft_from_each_exit_in_turn(runner_of(llm).drafter.drafter.policy)
        plain.check_all(llm, alone=FEW)
        assert counters(llm)["accepted_tokens"] > 0


def test_a_random_head_changes_nothing(smollm2: Path, plain: Reference, tmp_path: Path):
    heads = random_heads(tmp_path / "heads", smollm2, "recurrent", exit_layer=4, std=5.0)
    setting = {"method": "self_exit", "model": str(heads), "num_speculative_tokens": 3}
    with engine(smollm2, speculative_config=setting) as llm:
        plain.check(answer(llm, plain.prompts, 8), 8)
        counted = counters(llm)
    assert counted["draft_tokens"] > 1000
    assert counted["accepted_tokens"] < 0.01 * counted["draft_tokens"]


def test_near_ties_are_rare(plain: Reference):
    """Over all runs above, at most one prompt in fifty needed the excuse of a near tie."""
    assert plain.compared > 0
    assert plain.excused <= EXCUSES * plain.compared, f"{plain.excused} of {plain.compared}"
