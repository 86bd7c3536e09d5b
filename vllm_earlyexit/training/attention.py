"""The last layer's attention over packed sequences, as a draft step finds its keys and values.

For every token t of a sequence with d pending tokens before it, tokens before t - d have the full model's exact keys
and values; t itself and the d tokens before it have provisional ones, each from the draft step that it was drafted in.
"""

import functools
import importlib.util

import torch
from torch.nn import functional as F

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each [num_tokens, num_kv_heads, head_size]."""


@functools.lru_cache(maxsize=64)
def visible(length: int, pending: int, device: torch.device, deep_keys: bool = True) -> torch.Tensor:
    """Return which keys a sequence's queries see, bool [length, (pending + 2) * length].

    The keys are the exact ones, then those of draft steps 0 to ``pending``; step j provides just the keys that lie
    ``pending - j`` tokens back, because that is when they were drafted. Without ``deep_keys`` the exact ones are
    hidden.
    """
    distance = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    steps = [distance == pending - step for step in range(pending + 1)]
    return torch.cat([(distance > pending) & deep_keys, *steps], dim=1)


def attend(
    query: torch.Tensor, exact: KeyValue, drafted: list[KeyValue], lengths: list[int], deep_keys: bool = True
) -> torch.Tensor:
    """Attend within each sequence of a pack.

    Args:
        query: [num_tokens, num_heads, head_size].
        exact: Of all tokens, from the full model.
        drafted: Of all tokens, from draft step 0 up to the present one; all but one of them are pending.
        lengths: Tokens of each sequence; they sum to num_tokens.
        deep_keys: Whether exact keys and values are seen.

    Returns:
        [num_tokens, num_heads, head_size].
    """
    if query.is_cuda and deep_keys and importlib.util.find_spec("xformers"):
        return _attend_xformers(query, exact, drafted, lengths)
    parts = zip(
        query.split(lengths),
        *(tensor.split(lengths) for pair in [exact, *drafted] for tensor in pair),
        strict=True,
    )
    out = []
    for q, *rest in parts:
        keys, values = torch.cat(rest[::2]), torch.cat(rest[1::2])
        mask = visible(len(q), len(drafted) - 1, q.device, deep_keys)
        out.append(
            F.scaled_dot_product_attention(
                q.transpose(0, 1).unsqueeze(0),
                keys.to(q.dtype).transpose(0, 1).unsqueeze(0),
                values.to(q.dtype).transpose(0, 1).unsqueeze(0),
                mask,
                enable_gqa=True,
            )[0].transpose(0, 1)
        )
    return torch.cat(out)


def packed_bias(lengths: list[int], pending: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return ``visible`` for a whole pack as an additive bias, [num_tokens, (pending + 2) * num_tokens].

    xformers' block-diagonal causal bias keeps the sequences apart; the distance between query and key does the rest.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    total = sum(lengths)
    causal = BlockDiagonalCausalMask.from_seqlens(lengths).materialize((total, total), torch.float32)
    same = (causal == 0).to(device).repeat(1, pending + 2)
    seen = same & visible(total, pending, device)
    # xformers' kernels want rows that are aligned to eight elements.
    width = -(-seen.shape[1] // 8) * 8
    bias = torch.full((total, width), float("-inf"), dtype=dtype, device=device)[:, : seen.shape[1]]
    return bias.masked_fill_(seen, 0)


def _attend_xformers(query: torch.Tensor, exact: KeyValue, drafted: list[KeyValue], lengths: list[int]) -> torch.Tensor:
    """Attend in one call for the whole pack; never run on a GPU by the authors."""
    from xformers.ops import memory_efficient_attention

    groups = query.shape[1] // exact[0].shape[1]
    keys, values = (
        torch.cat([pair[n] for pair in [exact, *drafted]]).to(query.dtype).repeat_interleave(groups, dim=1)
        for n in range(2)
    )
    bias = packed_bias(lengths, len(drafted) - 1, query.dtype, query.device)
    bias = bias.expand(1, query.shape[1], *bias.shape)
    return memory_efficient_attention(query[None], keys[None], values[None], attn_bias=bias)[0]
