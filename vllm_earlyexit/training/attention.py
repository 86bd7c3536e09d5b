"""The last layer's attention over packed sequences, as a draft step finds its keys and values.

For every token t of a sequence with d pending tokens before it, tokens before t - d have the full model's exact keys
and values; t itself and the d tokens before it have provisional ones, each from the draft step that it was drafted in.
"""

import functools
import importlib.util
import math

import torch

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each [num_tokens, num_kv_heads, head_size]."""


@functools.lru_cache(maxsize=64)
def visible(length: int, pending: int, device: torch.device) -> torch.Tensor:
    """Return which keys a sequence's queries see, bool [length, (pending + 2) * length].

    The keys are the exact ones, then those of draft steps 0 to ``pending``; step j provides just the keys that lie
    ``pending - j`` tokens back, because that is when they were drafted.
    """
    distance = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    steps = [distance == pending - step for step in range(pending + 1)]
    return torch.cat([distance > pending, *steps], dim=1)


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
    keys, values = (zip(*(pair[n].split(lengths) for pair in drafted), strict=True) for n in range(2))
    parts = zip(query.split(lengths), *(x.split(lengths) for x in exact), keys, values, strict=True)
    return torch.cat([_attend_alone(q, (k, v), [*zip(ks, vs, strict=True)], deep_keys) for q, k, v, ks, vs in parts])


def _attend_alone(query: torch.Tensor, exact: KeyValue, drafted: list[KeyValue], deep_keys: bool) -> torch.Tensor:
    """Attend within one sequence; shapes and result as for ``attend``.

    Of a draft step a query sees one key at most. So only exact keys are worth a matrix product. PyTorch's fused
    attention would take the others as keys, too, nearly all of them masked, and is slower on CPUs with gradients.
    """
    length, kv_heads, size = exact[0].shape
    queries = (query * size**-0.5).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, groups, length, size]
    keys, values = (x.to(query.dtype).transpose(0, 1) for x in exact)
    pending = len(drafted) - 1
    hidden = query.new_full((length, length), -math.inf)
    hidden = hidden.triu(-pending) if deep_keys else hidden
    groups = queries.shape[1]
    scores = [torch.baddbmm(hidden.repeat(groups, 1), queries.flatten(1, 2), keys.mT).unflatten(1, (groups, length))]
    seen = []
    for step, pair in enumerate(drafted):
        back = pending - step
        key, value = (x.to(query.dtype).roll(back, dims=0).transpose(0, 1).unsqueeze(1) for x in pair)
        score = torch.linalg.vecdot(queries, key)
        score[..., :back] = -math.inf
        scores.append(score.unsqueeze(-1))
        seen.append(value)
    weights = torch.cat(scores, dim=-1).softmax(dim=-1)
    out = torch.bmm(weights[..., :length].flatten(1, 2), values).unflatten(1, (groups, length))
    for step, value in enumerate(seen):
        out = out + weights[..., length + step, None] * value
    return out.permute(2, 0, 1, 3).flatten(1, 2)


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
