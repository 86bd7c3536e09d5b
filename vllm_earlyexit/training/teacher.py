"""The frozen base model in transformers: the parts that heads lean on, and what the full model computes."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.modules import Context, LinearHead, MLPHead, TailHead
from vllm_earlyexit.training.attention import KeyValue, attend
from vllm_earlyexit.training.data import Window
from vllm_earlyexit.training.shards import Batch, window_key
from vllm_earlyexit.training.targets import top_targets

ROWS = 128
"""Heads run on multiples of so many tokens: oneDNN compiles every matrix product anew for another number of rows."""


def compute_dtype(device: str) -> torch.dtype:
    """Return bfloat16 where ``device`` computes in it, otherwise float32.

    x86 CPUs without instructions for it emulate bfloat16, which is much slower than float32. oneDNN says that it
    supports bfloat16 on all that have AVX-512.
    """
    if device != "cpu":
        return torch.bfloat16
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if native and platform.machine() in ("x86_64", "AMD64"):
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


@dataclass(frozen=True)
class Trained:
    """A head that was trained before, and where it sits."""

    module: nn.Module
    exit_layer: int


class PackedLastLayer:
    """The last decoder layer over a batch of packed windows; see ``attention.attend`` for who sees what.

    Args:
        layer: The last decoder layer.
        hidden: Its exact input, [num_tokens, hidden_size].
        rotary: Cosines and sines of every token's position, each [num_tokens, head_size].
        lengths: Tokens of each window.
        deep_keys: Whether the exact keys and values are seen.
    """

    def __init__(
        self,
        layer: Any,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        lengths: list[int],
        deep_keys: bool,
    ):
        self._layer, self._rotary, self._lengths, self._deep_keys = layer, rotary, lengths, deep_keys
        with torch.no_grad():
            self._exact = self._project(layer.input_layernorm(hidden))
        self._drafted: list[KeyValue] = []

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the last layer's input norm."""
        return self._layer.input_layernorm(hidden)

    def attend(self, query: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Attend as the next draft step, of which the first call is step 0; shapes as in ``LastLayer``."""
        self._drafted.append(self._project(normed))
        rotated = self._rotate(self._heads(query))
        return attend(rotated, self._exact, self._drafted, self._lengths, self._deep_keys).flatten(1)

    def _project(self, normed: torch.Tensor) -> KeyValue:
        attention = self._layer.self_attn
        normed = normed.to(attention.k_proj.weight.dtype)
        return self._rotate(self._heads(attention.k_proj(normed))), self._heads(attention.v_proj(normed))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self._layer.self_attn.head_dim))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = (part.unsqueeze(1).to(x.dtype) for part in self._rotary)
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin


class Teacher:
    """The base model, frozen, with its last layer, final norm and lm_head at hand.

    Args:
        folder: Of the model.
        device: Where it runs.
        dtype: In which it runs, by default the device's ``compute_dtype``.

    Raises:
        EarlyExitError: the model is not built like Llama or Qwen2.
    """

    def __init__(self, folder: Path, device: str, dtype: torch.dtype | None = None):
        from transformers import AutoModelForCausalLM

        self.device, self._dtype = device, dtype or compute_dtype(device)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        self._inner: Any = self.model.get_decoder()
        attention = self._inner.layers[-1].self_attn if hasattr(self._inner, "layers") else None
        if not all(hasattr(self._inner, name) for name in ("norm", "rotary_emb")) or not hasattr(attention, "k_proj"):
            raise EarlyExitError(
                f"training does not know its way around {type(self._inner).__name__}; "
                "supported are models built like Llama and Qwen2"
            )
        self._last: Any = self._inner.layers[-1]
        self.norm: nn.Module = self._inner.norm
        self.lm_head: nn.Linear = self.model.get_output_embeddings()
        self.num_layers = len(self._inner.layers)
        self.hidden_size: int = self.lm_head.in_features
        self.vocab_size: int = self.lm_head.out_features
        self.query_size: int = self._last.self_attn.q_proj.out_features

    @property
    def intermediate_size(self) -> int:
        """Width of the last layer's MLP."""
        return self._last.mlp.down_proj.in_features

    @property
    def num_heads(self) -> int:
        """Query heads of the last layer."""
        return self.query_size // self._last.self_attn.head_dim

    @property
    def layer_size(self) -> int:
        """Parameters of one decoder layer."""
        return sum(p.numel() for p in self._last.parameters())

    def autocast(self) -> torch.autocast:
        """Return a context in which heads, whose weights are float32, compute like the model."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self._dtype == torch.bfloat16)

    @torch.no_grad()
    def observe(self, windows: list[Window], exit_layers: tuple[int, ...], top_k: int) -> Batch:
        """Run one padded batch through the full model and return what is recorded of it."""
        lengths = torch.tensor([len(window.ids) for window in windows])
        ids = torch.tensor([token for window in windows for token in window.ids], dtype=torch.int32)
        out, real = self._run(ids, lengths)
        scored = torch.tensor([flag for window in windows for flag in window.scored])
        final = out.last_hidden_state[real]
        top_ids, top_p = top_targets(final[scored], self.lm_head, self.vocab_size, top_k)
        return Batch(
            windows=torch.tensor([window_key(window) for window in windows]),
            lengths=lengths,
            ids=ids,
            scored=scored,
            hidden={layer: out.hidden_states[layer][real] for layer in (*exit_layers, self.num_layers - 1)},
            final=final,
            top_ids=top_ids,
            top_p=top_p,
        )

    @torch.no_grad()
    def states(self, batch: Batch, exit_layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return hidden states after so many layers, each [num_tokens, hidden_size]; layers above are not run."""
        layers = self._inner.layers
        shape, starts = (len(batch.ids), self.hidden_size), batch.lengths.cumsum(0) - batch.lengths
        found = {layer: torch.empty(shape, dtype=self._dtype) for layer in exit_layers}
        self._inner.layers = layers[: max(exit_layers) + 1]  # the states after the last one would be normed
        try:
            for rows in batch.lengths.argsort().split(8):  # of about the same length
                lengths = batch.lengths[rows]
                firsts = zip(starts[rows].tolist(), lengths.tolist(), strict=True)
                at = torch.cat([torch.arange(first, first + length) for first, length in firsts])
                out, real = self._run(batch.ids[at], lengths)
                for layer, states in found.items():
                    states[at] = out.hidden_states[layer][real].cpu()
        finally:
            self._inner.layers = layers
        return found

    def _run(self, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Run windows of these lengths, one after the other in ``ids``; return output and where it is no padding."""
        real = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        padded = torch.zeros(real.shape, dtype=torch.int64).masked_scatter_(real, ids.long())
        out = self._inner(
            input_ids=padded.to(self.device),
            attention_mask=real.long().to(self.device),
            output_hidden_states=True,
            use_cache=False,
        )
        return out, real

    def last_layer(self, batch: Batch, deep_keys: bool = True) -> PackedLastLayer:
        """Return the last layer's attention over a batch, with or without exact keys and values."""
        lengths = batch.lengths.tolist()
        hidden = batch.hidden[self.num_layers - 1]
        positions = torch.cat([torch.arange(length) for length in lengths]).to(hidden.device)
        cos, sin = self._inner.rotary_emb(hidden, positions.unsqueeze(0))
        return PackedLastLayer(self._last, hidden, (cos[0], sin[0]), lengths, deep_keys)

    def unembed(self, features: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits [num_tokens, num_rows] for normed features; ``rows`` of lm_head, by default all."""
        weight = self.lm_head.weight if rows is None else rows
        return F.linear(_whole_rows(features.to(weight.dtype)), weight)[: len(features)]

    def rows(self, draft_vocab: torch.Tensor | None) -> torch.Tensor:
        """Return lm_head's rows for the draft vocabulary, [draft_vocab_size, hidden_size]."""
        return self.lm_head.weight if draft_vocab is None else self.lm_head.weight[draft_vocab.to(self.device)]

    def start(self, head: nn.Module, exit_layer: int, batch: Batch, like: "Trained | None" = None) -> None:
        """Start a head close to the model, or to a trained head of the same kind.

        Without the latter, the layer of a head that attends starts as the last layer, and its bridge predicts by
        least squares on ``batch`` the last layer's input; the bridge of any other head predicts the full model's
        features, that is the final hidden state before the final norm's weight. With it, all weights are its, and
        if it sits at another exit, the bridge predicts what its own makes of the hidden states there.
        """
        if like is not None:
            head.load_state_dict(like.module.state_dict())
            if like.exit_layer == exit_layer or not hasattr(head, "bridge"):
                return
            with torch.no_grad():
                target = like.module.get_submodule("bridge")(batch.hidden[like.exit_layer].float())
                if isinstance(like.module, TailHead) and like.module.recurrence is not None:
                    target += like.module.recurrence(shifted(batch.final, first_tokens(batch)).float())
        elif isinstance(head, TailHead):
            self._copy_last_layer(head)
            target = batch.hidden[self.num_layers - 1]
        elif isinstance(head, LinearHead | MLPHead):
            target = batch.final / self.norm.get_parameter("weight")
        else:
            return
        self._fit_bridge(head, exit_layer, batch, target)

    def _fit_bridge(self, head: nn.Module, exit_layer: int, batch: Batch, target: torch.Tensor) -> None:
        """Set a head's bridge, and the map of the token before, to what best predicts ``target`` (ridge regression)."""
        assert isinstance(head, TailHead | LinearHead | MLPHead)
        inputs, first = [batch.hidden[exit_layer].float()], first_tokens(batch)
        recurrence = head.recurrence if isinstance(head, TailHead) else None
        if recurrence is not None:
            inputs.append(shifted(batch.final, first).float())
        size, known = self.hidden_size, first.logical_not() & batch.scored
        design = torch.cat([*inputs, torch.ones(len(target), 1)], dim=1)[known]
        gram = design.T @ design
        ridge = 10 * design.pow(2).mean() * torch.eye(design.shape[1])
        solution = torch.linalg.solve(gram + ridge, design.T @ target.float()[known])
        with torch.no_grad():
            head.bridge.weight.copy_(solution[:size].T)
            head.bridge.bias.copy_(solution[-1])
            if recurrence is not None:
                recurrence.weight.copy_(solution[size : 2 * size].T)

    def _copy_last_layer(self, head: TailHead) -> None:
        attention, mlp = self._last.self_attn, self._last.mlp
        pairs = [
            (head.q_proj.weight, attention.q_proj.weight),
            (head.o_proj.weight, attention.o_proj.weight),
        ]
        if attention.q_proj.bias is not None:
            pairs.append((head.q_proj.bias, attention.q_proj.bias))
        if mlp.down_proj.weight.shape == head.mlp.down.weight.shape:
            pairs += [
                (head.mlp.norm.weight, self._last.post_attention_layernorm.weight),
                (head.mlp.gate_up.weight, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])),
                (head.mlp.down.weight, mlp.down_proj.weight),
            ]
        with torch.no_grad():
            for ours, theirs in pairs:
                ours.copy_(theirs)


def first_tokens(batch: Batch) -> torch.Tensor:
    """Return which tokens begin a window, bool [num_tokens]."""
    first = torch.zeros(len(batch.ids), dtype=torch.bool)
    first[[0, *accumulate(batch.lengths.tolist()[:-1])]] = True
    return first


def shifted(states: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return each token's predecessor's row of ``states`` [num_tokens, ...], zeros where ``first``."""
    return states.roll(1, dims=0).masked_fill(first.to(states.device).unsqueeze(-1), 0)


def _padded(batch: Batch, layer: int) -> Batch:
    """Return a batch with one more window, of zeros, up to a multiple of ``ROWS``; hidden states of ``layer`` alone."""
    count = -len(batch.ids) % ROWS
    if count == 0:
        return batch
    return replace(
        batch,
        lengths=torch.cat([batch.lengths, torch.tensor([count])]),
        ids=F.pad(batch.ids, (0, count)),
        scored=F.pad(batch.scored, (0, count)),
        hidden={layer: _whole_rows(batch.hidden[layer])},
        final=_whole_rows(batch.final),
    )


def _whole_rows(states: torch.Tensor) -> torch.Tensor:
    """Return states [num_tokens, size] with rows of zeros up to a multiple of ``ROWS``."""
    return F.pad(states, (0, 0, 0, -len(states) % ROWS))


def draft_steps(
    teacher: Teacher, head: nn.Module, hidden: torch.Tensor, batch: Batch, pending: int, deep_keys: bool = True
) -> list[torch.Tensor]:
    """Run a head at draft steps 0 to ``pending`` over every token of a batch.

    At step d each token has d pending tokens before it, in the state in which their own draft steps left them.
    Gradients flow through the last step only.

    Args:
        teacher: The base model.
        head: Any exit head.
        hidden: Hidden states at its cut, [num_tokens, hidden_size].
        batch: Where they are from.
        pending: The last draft step.
        deep_keys: Whether exact keys and values of verified tokens are seen.

    Returns:
        For each step the head's features after the final norm, [num_tokens, hidden_size].
    """
    count, batch = len(batch.ids), _padded(batch, teacher.num_layers - 1)
    last, first = teacher.last_layer(batch, deep_keys), first_tokens(batch)
    hidden, previous = _whole_rows(hidden), shifted(batch.final, first)
    learning, steps = torch.is_grad_enabled(), []
    for step in range(pending + 1):
        with torch.set_grad_enabled(learning and step == pending):
            features = head(hidden.float(), Context(last, previous.float()))
            steps.append(teacher.norm(features.to(batch.final.dtype)))
        previous = shifted(steps[-1].detach(), first)
    return [features[:count] for features in steps]
