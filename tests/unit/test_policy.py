import math

import torch

from vllm_earlyexit.engine.policy import EntropyPolicy, FixedPolicy
from vllm_earlyexit.heads.uncertainty import entropy

ROWS = torch.arange(2)


def test_entropy_of_known_distributions():
    uniform = torch.zeros(1, 8)
    certain = torch.tensor([[0.0, 0.0, 1000.0, 0.0]])
    coin = torch.tensor([[3.0, 3.0, -1000.0]])
    assert math.isclose(entropy(uniform).item(), math.log(8), rel_tol=1e-6)
    assert entropy(certain).item() == 0
    assert math.isclose(entropy(coin).item(), math.log(2), rel_tol=1e-6)


def test_entropy_policy_keeps_tokens_at_or_below_the_threshold():
    unsure = torch.tensor([0.7, 0.05])
    assert EntropyPolicy([0.1]).decide(ROWS, unsure, 0).keep.tolist() == [False, True]
    assert EntropyPolicy([1.0]).decide(ROWS, unsure, 0).keep.tolist() == [True, True]


def test_logits_that_are_not_numbers_stop_an_entropy_draft():
    broken = entropy(torch.full((1, 4), math.nan))
    assert EntropyPolicy([10.0]).decide(ROWS[:1], broken, 0).keep.tolist() == [False]


def test_fixed_policy_keeps_everything():
    decision = FixedPolicy().decide(ROWS, torch.full((2,), math.nan), 0)
    assert decision.keep.tolist() == [True, True]
    assert decision.go_on


def test_entropy_policy_takes_unsure_tokens_to_the_next_exit():
    ladder = EntropyPolicy([0.1, 0.5])
    first = ladder.decide(torch.arange(3), torch.tensor([0.3, 0.05, math.nan]), 0)
    assert first.keep.tolist() == [False, True, False]
    assert first.deeper is not None
    assert first.deeper.tolist() == [True, False, False], "a head that says nonsense ends the draft"
    last = ladder.decide(ROWS[:1], torch.tensor([0.3]), 1)
    assert (last.keep.tolist(), last.deeper) == ([True], None)
