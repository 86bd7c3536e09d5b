import math

import torch

from vllm_earlyexit.engine.policy import EntropyPolicy, FixedPolicy
from vllm_earlyexit.heads.uncertainty import entropy


def test_entropy_of_known_distributions():
    uniform = torch.zeros(1, 8)
    certain = torch.tensor([[0.0, 0.0, 1000.0, 0.0]])
    coin = torch.tensor([[3.0, 3.0, -1000.0]])
    assert math.isclose(entropy(uniform).item(), math.log(8), rel_tol=1e-6)
    assert entropy(certain).item() == 0
    assert math.isclose(entropy(coin).item(), math.log(2), rel_tol=1e-6)


def test_entropy_policy_keeps_tokens_at_or_below_the_threshold():
    logits = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
    assert EntropyPolicy(0.1).keep(logits).tolist() == [False, True]
    assert EntropyPolicy(1.0).keep(logits).tolist() == [True, True]


def test_logits_that_are_not_numbers_stop_an_entropy_draft():
    assert EntropyPolicy(10.0).keep(torch.full((1, 4), math.nan)).tolist() == [False]


def test_fixed_policy_keeps_everything():
    assert FixedPolicy().keep(torch.zeros(3, 4)).tolist() == [True] * 3
