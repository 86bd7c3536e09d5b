"""The frozen full model, run with transformers: hidden states at the cuts and what it would say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.training.data import Window, pad


@dataclass(frozen=True)
class Observed:
    """What the full model did on the scored tokens of one batch.

    Attributes:
        hidden: exit layer to hidden states there, [num_tokens, hidden_size].
        logits: The full model's logits, [num_tokens, vocab_size].
        rows: Number of scored tokens of each window, in order; they sum to num_tokens.
    """

    hidden: dict[int, torch.Tensor]
    logits: torch.Tensor
    rows: list[int]


class Teacher:
    """The base model, frozen, with its final norm and lm_head at hand."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        inner = self.model.get_decoder()
        if not hasattr(inner, "norm") or not hasattr(inner, "layers"):
            raise EarlyExitError(
                f"training does not know where {type(inner).__name__} keeps its layers and final norm; "
                "supported: models with .layers and .norm, such as Llama and Qwen2"
            )
        self.norm: nn.Module = inner.norm
        self.lm_head: nn.Linear = self.model.get_output_embeddings()
        self.num_layers = len(inner.layers)
        self.hidden_size: int = self.lm_head.in_features
        self.vocab_size: int = self.lm_head.out_features

    @torch.no_grad()
    def observe(self, batch: list[Window], exit_layers: list[int]) -> Observed:
        """Run one batch through the full model."""
        ids, mask, scored = (t.to(self.device) for t in pad(batch, self.tokenizer.pad_token_id or 0))
        out = self.model.get_decoder()(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return Observed(
            hidden={layer: out.hidden_states[layer][scored] for layer in exit_layers},
            logits=self.lm_head(out.last_hidden_state[scored]),
            rows=scored.sum(dim=1).tolist(),
        )

    def unembed(self, features: torch.Tensor, draft_vocab: torch.Tensor | None) -> torch.Tensor:
        """Return logits over the draft vocabulary, [num_tokens, draft_vocab_size]."""
        weight = self.lm_head.weight if draft_vocab is None else self.lm_head.weight[draft_vocab]
        return F.linear(self.norm(features.to(weight.dtype)), weight)
