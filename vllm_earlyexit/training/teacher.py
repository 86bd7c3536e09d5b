"""The frozen full model, run with transformers: hidden states at the cuts and what it would say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.modules import TailHead
from vllm_earlyexit.training.data import Window, pad


class DenseLastLayer:
    """The last decoder layer's keys and values over a padded batch, as a draft step would find them.

    For every token t, tokens before t - pending have the full model's exact keys and values; t itself and the
    ``pending`` tokens before it have provisional ones.

    Args:
        layer: The last decoder layer.
        hidden: Its exact input, [batch, length, hidden_size].
        rotary: Cosines and sines, each [1, length, head_size].
        pending: Number of pending tokens before each token.
    """

    def __init__(self, layer: Any, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], pending: int):
        self._layer, self._rotary = layer, rotary
        with torch.no_grad():
            self._key, self._value = self._project(layer.input_layernorm(hidden))
        length = hidden.shape[1]
        distance = torch.arange(length).unsqueeze(1) - torch.arange(length)  # query minus key
        exact, provisional = distance > pending, (distance >= 0) & (distance <= pending)
        self._mask = torch.cat([exact, provisional], dim=1).to(hidden.device)  # [length, 2 * length]

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the last layer's input norm."""
        return self._layer.input_layernorm(hidden)

    def attend(self, query: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Attend over exact and provisional keys; shapes as in ``LastLayer``."""
        key, value = self._project(normed)
        query = self._rotate(self._heads(query))
        keys, values = torch.cat([self._key, key], dim=2), torch.cat([self._value, value], dim=2)
        out = F.scaled_dot_product_attention(
            query, keys.to(query.dtype), values.to(query.dtype), self._mask, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(2)

    def _project(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attention = self._layer.self_attn
        normed = normed.to(attention.k_proj.weight.dtype)
        return self._rotate(self._heads(attention.k_proj(normed))), self._heads(attention.v_proj(normed))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self._layer.self_attn.head_dim)).transpose(1, 2)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = (part.unsqueeze(1).to(x.dtype) for part in self._rotary)
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin


@dataclass(frozen=True)
class Observed:
    """What the full model did on one padded batch.

    Attributes:
        hidden: exit layer to hidden states there, [batch, length, hidden_size].
        last: The last layer's attention, for tail heads.
        scored: Tokens that are learned or measured, bool [batch, length].
        logits: The full model's logits on the scored tokens, [num_tokens, vocab_size].
    """

    hidden: dict[int, torch.Tensor]
    last: DenseLastLayer
    scored: torch.Tensor
    logits: torch.Tensor

    @property
    def rows(self) -> list[int]:
        """Number of scored tokens of each window, in order; they sum to num_tokens."""
        return self.scored.sum(dim=1).tolist()

    def features(self, exit_layer: int, head: nn.Module) -> torch.Tensor:
        """Return a head's features on the scored tokens, [num_tokens, hidden_size]."""
        return head(self.hidden[exit_layer].float(), self.last)[self.scored]


class Teacher:
    """The base model, frozen, with its final norm and lm_head at hand."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        inner = self.model.get_decoder()
        attention = inner.layers[-1].self_attn if hasattr(inner, "layers") else None
        if not all(hasattr(inner, name) for name in ("norm", "rotary_emb")) or not hasattr(attention, "k_proj"):
            raise EarlyExitError(
                f"training does not know its way around {type(inner).__name__}; "
                "supported are models built like Llama and Qwen2"
            )
        self.norm: nn.Module = inner.norm
        self.lm_head: nn.Linear = self.model.get_output_embeddings()
        self.num_layers = len(inner.layers)
        self.hidden_size: int = self.lm_head.in_features
        self.vocab_size: int = self.lm_head.out_features
        self.query_size: int = inner.layers[-1].self_attn.q_proj.out_features

    @torch.no_grad()
    def observe(self, batch: list[Window], exit_layers: list[int], pending: int = 0) -> Observed:
        """Run one batch through the full model; ``pending`` is for tail heads, see ``DenseLastLayer``."""
        ids, mask, scored = (t.to(self.device) for t in pad(batch, self.tokenizer.pad_token_id or 0))
        inner = self.model.get_decoder()
        out = inner(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        positions = torch.arange(ids.shape[1], device=self.device).unsqueeze(0)
        before_last = out.hidden_states[self.num_layers - 1]
        rotary = inner.rotary_emb(before_last, positions)
        return Observed(
            hidden={layer: out.hidden_states[layer] for layer in exit_layers},
            last=DenseLastLayer(inner.layers[-1], before_last, rotary, pending),
            scored=scored,
            logits=self.lm_head(out.last_hidden_state[scored]),
        )

    def unembed(self, features: torch.Tensor, draft_vocab: torch.Tensor | None) -> torch.Tensor:
        """Return logits over the draft vocabulary, [num_tokens, draft_vocab_size]."""
        weight = self.lm_head.weight if draft_vocab is None else self.lm_head.weight[draft_vocab]
        return F.linear(self.norm(features.to(weight.dtype)), weight)

    def start_as_last_layer(self, head: TailHead) -> None:
        """Start a tail head as the model's own last layer, as far as the shapes are the same."""
        layer = self.model.get_decoder().layers[-1]
        attention, mlp = layer.self_attn, layer.mlp
        pairs = [
            (head.q_proj.weight, attention.q_proj.weight),
            (head.o_proj.weight, attention.o_proj.weight),
        ]
        if attention.q_proj.bias is not None:
            pairs.append((head.q_proj.bias, attention.q_proj.bias))
        if mlp.down_proj.weight.shape == head.mlp.down.weight.shape:
            pairs += [
                (head.mlp.norm.weight, layer.post_attention_layernorm.weight),
                (head.mlp.gate_up.weight, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])),
                (head.mlp.down.weight, mlp.down_proj.weight),
            ]
        with torch.no_grad():
            for ours, theirs in pairs:
                ours.copy_(theirs)
