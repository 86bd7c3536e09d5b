"""Distillation losses on the full model's most probable next tokens and the mass of the rest."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_earlyexit.heads.checkpoint import LossName

ROWS = 16
"""Rows of logits that are handled at once, so that they stay in a CPU's cache; for 16,384 tokens this is 1 MB."""


class LogProbabilities(torch.autograd.Function):
    """Log-probabilities of a few tokens of each row: a log-softmax that is never written out.

    ``apply(logits, index)`` takes logits [num_tokens, size] of any float type and indices int64 [num_tokens, top_k],
    and returns float32 [num_tokens, top_k].
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return ``logits.log_softmax(-1).gather(1, index)``."""
        log_q = torch.empty(index.shape, dtype=torch.float32, device=logits.device)
        log_total = torch.empty(len(logits), 1, dtype=torch.float32, device=logits.device)
        for start in range(0, len(logits), ROWS):
            part = slice(start, start + ROWS)
            rows = logits[part].float()
            log_total[part] = rows.logsumexp(dim=-1, keepdim=True)
            log_q[part] = rows.gather(1, index[part]) - log_total[part]
        ctx.save_for_backward(logits, index, log_total)
        return log_q

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of the logits: the upstream gradient at ``index`` less its sum times the softmax."""
        (gradient,) = gradients
        logits, index, log_total = ctx.saved_tensors
        total = -gradient.sum(dim=-1, keepdim=True)
        out = torch.empty_like(logits)
        for start in range(0, len(logits), ROWS):
            part = slice(start, start + ROWS)
            softmax = logits[part].float().sub_(log_total[part]).exp_()
            out[part] = softmax.mul_(total[part]).scatter_add_(1, index[part], gradient[part])
        return out, None


class Target:
    """What the full model says, as far as it can be drafted.

    The outcomes are its ``top_k`` tokens that lie in the draft vocabulary, and "any other token" as one more. Tokens
    outside the draft vocabulary cannot be said; their mass is taken out, and what is left weighs so much less.

    Args:
        top_ids: Most probable tokens, falling, int [num_tokens, top_k].
        top_p: Their probabilities, [num_tokens, top_k].
        draft_index: Token id to index in the draft vocabulary, -1 outside; int64 [vocab_size].
    """

    def __init__(self, top_ids: torch.Tensor, top_p: torch.Tensor, draft_index: torch.Tensor):
        index, p = draft_index[top_ids.long()], top_p.float()
        drafted = index >= 0
        kept = p * drafted
        rest = (1 - p.sum(dim=-1)).clamp(min=0)
        self.weight = kept.sum(dim=-1) + rest  # [num_tokens]
        """The full model's mass on the draft vocabulary."""
        scale = 1 / self.weight.clamp(min=1e-6)
        self.p = kept * scale.unsqueeze(-1)
        """Probabilities of the top tokens within the draft vocabulary, 0 outside it; [num_tokens, top_k]."""
        self.rest = rest * scale
        """Probability of all other tokens of the draft vocabulary, [num_tokens]."""
        self.index = index.clamp(min=0)
        self.drafted = drafted

    def log_q(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the head's log-probabilities of the same outcomes: [num_tokens, top_k] and [num_tokens]."""
        log_q = LogProbabilities.apply(logits, self.index)
        said = (log_q.exp() * self.drafted).sum(dim=-1)
        return log_q, torch.log1p(-said.clamp(max=1 - 1e-6))


def kl(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """Return KL(full model || head) in nats, a mean over tokens (Hinton et al., 2015)."""
    log_q, log_rest = target.log_q(logits)
    divergence = torch.xlogy(target.p, target.p).sum(dim=-1) + torch.xlogy(target.rest, target.rest)
    divergence = divergence - (target.p * log_q).sum(dim=-1) - target.rest * log_rest
    return (divergence * target.weight).mean()


def tv(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """Return the total variation distance, a mean over tokens.

    One minus it is the rate at which sampled drafts are accepted (Zhou et al., DistillSpec, ICLR 2024).
    """
    log_q, log_rest = target.log_q(logits)
    distance = ((target.p - log_q.exp()).abs() * target.drafted).sum(dim=-1) + (target.rest - log_rest.exp()).abs()
    return (distance / 2 * target.weight).mean()


def ce(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """Return the cross-entropy to the full model's first choice (Cai et al., Medusa, ICML 2024)."""
    log_q, _ = target.log_q(logits)
    return -(log_q[:, 0] * target.drafted[:, 0]).mean()


def feature_distance(features: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of a head's features to the full model's, over the latter's square.

    A mean over tokens; a regression term as in EAGLE (Li et al., ICML 2024). It says more about a token than its most
    probable successors, and is there for tokens that nobody answers, too.

    Args:
        features: After the final norm, [num_tokens, hidden_size].
        final: The full model's final hidden state there, [num_tokens, hidden_size].
    """
    final = final.float()
    return ((features.float() - final).pow(2).sum(dim=-1) / final.pow(2).sum(dim=-1).clamp(min=1e-6)).mean()


LOSSES: dict[LossName, Callable[[torch.Tensor, Target], torch.Tensor]] = {"kl": kl, "tv": tv, "ce": ce}
