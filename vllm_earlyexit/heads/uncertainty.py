"""How unsure an exit head is."""

import torch


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy H = -Σ p ln p in nats of each row of [n, vocab_size] logits, float32 [n]."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)
