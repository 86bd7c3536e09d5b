"""What a sequence repeats of itself, and whether ``auto`` takes it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_cost import BOUND, CPU, FREE, auto, begins
from vllm_earlyexit.engine.cost import Copying
from vllm_earlyexit.engine.frontier import Frontier
from vllm_earlyexit.engine.lookup import LONGEST, SHORTEST, Repeat, repeat_in
from vllm_earlyexit.engine.policy import FixedPolicy

SURE = Repeat(LONGEST, (5, 6, 7, 8))


def slow_repeat(tokens: list[int], most: int) -> Repeat:
    """Try every length and every place."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        newest = tokens[-length:]
        starts = [n for n in range(length, len(tokens)) if tokens[n - length : n] == newest]
        if len(tokens) >= length and starts:
            followed = [n for n in starts if n + most <= len(tokens)]
            start = followed[-1] if followed else starts[0]
            return Repeat(length, tuple(tokens[start : start + most]))
    return Repeat()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(0, 6))
def test_the_longest_repeat_is_found(tokens: list[int], most: int):
    assert repeat_in(np.array(tokens, dtype=np.int32), most) == slow_repeat(tokens, most)


def test_a_place_with_enough_behind_it_goes_before_a_later_one():
    assert repeat_in(np.array([1, 2, 3, 4, 1, 2, 1, 2]), 3) == Repeat(2, (3, 4, 1))
    assert repeat_in(np.array([7, 7, 7]), 3) == Repeat(2, (7,))


def test_it_copies_instead_of_drafting_where_that_is_worth_more():
    policy = auto(CPU, sharpness=0.2)
    assert begins(policy, 3, lambda: [SURE, Repeat(), Repeat()]), "the others are still asked about"
    assert policy.copied == {0: 4}
    for repeat in (SURE, Repeat(SHORTEST, (5,))):
        better = auto(FREE, sharpness=0.01)
        assert begins(better, 1, lambda repeat=repeat: [repeat]), "a head that is nearly always right drafts more"
        assert not better.copied


def test_copies_cost_rows_of_verification():
    policy = auto(BOUND)
    assert not begins(policy, 8, lambda: [SURE] * 8)
    assert not policy.copied, "where every token costs its share a copy that may be rejected does not pay"


def test_after_rejected_copies_the_head_is_asked_instead():
    policy = auto(CPU, sharpness=0.3)
    policy._clock = lambda: 0.0  # nothing is learned from time
    copied, asked = [], []
    for _ in range(400):
        asked.append(begins(policy, 1, lambda: [SURE]))
        copied.append(bool(policy.copied))
        if policy.copied:
            policy.learn(0, 4, 0)
    assert copied[0]
    assert not asked[0]
    assert sum(copied[200:]) < 50, "but for a try now and then"
    assert sum(asked[200:]) > 90


def test_fast_copies_do_not_make_drafting_elsewhere_look_slow():
    policy = auto(CPU, sharpness=0.3)
    policy._clock = lambda: 0.0  # nothing is learned from time
    assert begins(policy, 1)
    before = policy._rate
    for _ in range(200):
        begins(policy, 1, lambda: [Repeat(LONGEST, tuple(range(16)))])
        if policy.copied:
            policy.learn(0, 16, 16)
    assert policy._rate == pytest.approx(before, rel=0.05)
    assert begins(policy, 1) or begins(policy, 1), "one of the two may be a round without a draft"


def test_copies_are_learned_token_by_token():
    copying = Copying()
    first = copying.of(4, 3)
    copying.learn(4, verified=3, accepted=3)
    assert (copying.of(4, 3) > first).all()
    assert (copying.of(5, 3) > copying.of(3, 3)).all(), "longer repeats promise more from the start"
    for _ in range(2000):
        copying.learn(4, verified=4, accepted=0)
        copying.learn(4, verified=4, accepted=2)
        copying.learn(4, verified=4, accepted=4)
    expected = np.array([2 / 3, 2 / 3 * 4 / 5, 2 / 3 * (4 / 5) ** 2])
    assert copying.of(4, 3) == pytest.approx(expected, abs=0.05), "two of three go on, for four more of five tested"
    for _ in range(5000):
        copying.forget(4)
    assert copying.of(4, 3) == pytest.approx(Copying().of(4, 3), abs=0.02)


def test_it_copies_behind_what_the_head_has_drafted():
    policy = auto(CPU, sharpness=0.3)
    assert begins(policy, 2, lambda: [Repeat(), Repeat()])
    policy.decide(torch.arange(2), torch.tensor([0.01, 3.9]), 0)
    weak = Repeat(SHORTEST, (5, 6, 7, 8))
    assert policy.append(lambda: [SURE, weak])[0] == 4
    before = policy._copying.of(LONGEST, 1)
    policy.learn(0, 5, 0)
    assert policy._copying.of(LONGEST, 1) == before, "the head's token was rejected: nothing is known of the copy"
    policy.learn(0, 5, 1)
    assert policy._copying.of(LONGEST, 1) < before
    assert not FixedPolicy().append(lambda: [SURE]), "LayerSkip's rule copies nothing"


def test_a_copied_sequence_is_out_of_the_round():
    frontier = Frontier(range(3), [4, 5, 6], [2, 2, 2], "cpu")
    frontier.copy({1: [8, 9]})
    assert frontier.step is not None
    assert frontier.step.rows.tolist() == [0, 2]
    frontier.keep({"hidden": torch.zeros(2, 1)}, cut=0)
    frontier.advance(torch.tensor([3, 3]), torch.tensor([False, False]))
    assert frontier.drafts() == [[], [8, 9], []]
    assert [frontier.pending(row) for row in range(3)] == [[0], [], [2]], "what is copied was not fed"
