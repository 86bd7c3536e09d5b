"""What a head attends over while it drafts: the paged KV cache of the model's last layer."""

from typing import Any

import torch

from vllm_earlyexit.engine.models import decoder_stack


class PagedLastLayer:
    """The last decoder layer's norm, K/V projection and attention over its own paged KV cache.

    Keys and values of pending tokens are written to their own slots in the last layer's cache, where verification
    overwrites them. Use it within the forward context of a draft step.
    """

    def __init__(self, model: Any):
        layer = decoder_stack(model)[1].layers[-1]
        self._norm, self._attention = layer.input_layernorm, layer.self_attn
        self.positions = torch.empty(0, dtype=torch.int64)
        """Positions of the tokens that are about to be drafted from, int64 [n]."""

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the last layer's input norm to [n, hidden_size]."""
        return self._norm(hidden)

    def attend(self, query: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Attend with queries [n, query_size] at ``positions``; return [n, query_size]."""
        attention = self._attention
        qkv, _ = attention.qkv_proj(normed)
        _, key, value = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        query, key = attention.rotary_emb(self.positions, query, key)
        return attention.attn(query, key, value)
