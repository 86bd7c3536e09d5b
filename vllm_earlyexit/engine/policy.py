"""Exit policies: after each draft step, which tokens are sure enough to be drafted."""

from typing import Protocol

import torch

from vllm_earlyexit.config import EarlyExitConfig
from vllm_earlyexit.heads.uncertainty import entropy


class Policy(Protocol):
    """Decides per token whether to draft it or to stop and verify."""

    def keep(self, logits: torch.Tensor) -> torch.Tensor:
        """Return bool [n] for exit-head logits [n, draft_vocab_size]."""


class FixedPolicy:
    """LayerSkip's rule: always draft the full length."""

    def keep(self, logits: torch.Tensor) -> torch.Tensor:
        """Return True for every token."""
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)


class EntropyPolicy:
    """Stop at the first token whose entropy H = -Σ p ln p is above a calibrated threshold (DSSD).

    Args:
        threshold: Nats.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold

    def keep(self, logits: torch.Tensor) -> torch.Tensor:
        """Return whether the entropy is at most the threshold; logits that are not numbers stop the draft."""
        return entropy(logits) <= self.threshold


def build_policy(config: EarlyExitConfig) -> Policy:
    """Return the policy that ``config`` names."""
    if config.policy == "entropy":
        assert config.entropy_threshold is not None
        return EntropyPolicy(config.entropy_threshold)
    return FixedPolicy()
