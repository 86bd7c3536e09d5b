"""What heads learn to say: the full model's most probable next tokens."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

BLOCK = 64
"""Logits of which the largest is found first; a power of two."""
LOGITS_BYTES = 24 << 20
"""Of logits at a time. glibc asks the kernel for what is larger than 32 MiB, and new pages cost half the product."""
CACHED_ROWS = 4
"""Rows at a time that stay in a CPU's cache as float32."""


def top_targets(
    final: torch.Tensor, unembed: Callable[[torch.Tensor], torch.Tensor], vocab_size: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable next tokens and their probabilities at temperature 1.

    Args:
        final: Final hidden states, [num_tokens, hidden_size].
        unembed: From final hidden states to logits, [n, vocab_size]; ``LOGITS_BYTES`` of them exist at a time.
        vocab_size: Of these logits.
        top_k: How many to return for each token, falling.

    Returns:
        Token ids int32 and probabilities float16, each [num_tokens, top_k].
    """
    ids, p = [torch.empty(0, top_k, dtype=torch.int32)], [torch.empty(0, top_k, dtype=torch.float16)]
    for rows in final.split(max(16, LOGITS_BYTES // (vocab_size * final.element_size()) // 16 * 16)):
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
    n = CACHED_ROWS if logits.device.type == "cpu" else len(logits)
    scratch = torch.empty(n, logits.shape[1], device=logits.device)
    parts = zip(logits.split(n), largest.split(n), strict=True)
    total = torch.cat(
        [torch.sub(rows, most, out=scratch[: len(rows)]).exp_().sum(dim=-1, keepdim=True) for rows, most in parts]
    )
    return indices.to(torch.int32).cpu(), ((values.float() - largest).exp() / total).to(torch.float16).cpu()


def _top(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``logits.topk(top_k)``, found in the ``top_k`` blocks with the largest maxima, where it must be.

    A block's logits lie far apart, so that blocks are compared by halving rows, many of them in one instruction.
    """
    if logits.shape[1] <= top_k * BLOCK:
        return logits.topk(top_k)
    if more := -logits.shape[1] % BLOCK:
        logits = F.pad(logits, (0, more), value=float("-inf"))
    width = logits.shape[1] // BLOCK
    maxima = logits
    while maxima.shape[1] > width:
        maxima = torch.maximum(*maxima.chunk(2, dim=1))
    best = maxima.topk(top_k).indices
    inside = best.unsqueeze(1).expand(-1, BLOCK, -1)
    values, at = logits.unflatten(1, (BLOCK, width)).gather(2, inside).flatten(1).topk(top_k)
    return values, best.gather(1, at % top_k) + at // top_k * width
