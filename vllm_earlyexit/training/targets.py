"""What heads learn to say: the full model's most probable next tokens."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

BLOCK = 64
ROWS = 512
CACHED_ROWS = 8


def top_targets(
    final: torch.Tensor, unembed: Callable[[torch.Tensor], torch.Tensor], top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable next tokens and their probabilities at temperature 1.

    Args:
        final: Final hidden states, [num_tokens, hidden_size]; logits exist for ``ROWS`` of them at a time.
        unembed: From final hidden states to logits, [n, vocab_size].
        top_k: How many to return for each token, falling.

    Returns:
        Token ids int32 and probabilities float16, each [num_tokens, top_k].
    """
    ids, p = [torch.empty(0, top_k, dtype=torch.int32)], [torch.empty(0, top_k, dtype=torch.float16)]
    for rows in final.split(ROWS):
        if not len(rows):
            continue
        some_ids, some_p = top_of(unembed(rows), top_k)
        ids.append(some_ids)
        p.append(some_p)
    return torch.cat(ids), torch.cat(p)


def top_of(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``top_targets`` does, given logits [num_tokens, vocab_size]."""
    values, indices = _top(logits, top_k)
    largest = values[:, :1].float()
    # A few rows at a time stay in a CPU's cache, which makes this several times as fast.
    parts = zip(logits.split(CACHED_ROWS), largest.split(CACHED_ROWS), strict=True)
    total = torch.cat([(rows.float() - most).exp_().sum(dim=-1, keepdim=True) for rows, most in parts])
    return indices.to(torch.int32).cpu(), ((values.float() - largest).exp() / total).to(torch.float16).cpu()


def _top(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``logits.topk(top_k)``, found in the ``top_k`` blocks with the largest maxima, where it must be."""
    width = -(-logits.shape[1] // BLOCK) * BLOCK
    blocks = F.pad(logits, (0, width - logits.shape[1]), value=float("-inf")).unflatten(1, (-1, BLOCK))
    if blocks.shape[1] <= top_k:
        return logits.topk(top_k)
    best = blocks.amax(dim=-1).topk(top_k).indices
    candidates = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)
    values, at = candidates.topk(top_k)
    return values, best.gather(1, at // BLOCK) * BLOCK + at % BLOCK
