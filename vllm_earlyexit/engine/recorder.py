"""Record what vLLM computes while it prefills and decodes: hidden states at the cuts, and what the model would say."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sequence import IntermediateTensors

from vllm_earlyexit.engine.models import BASES, ExitMixin, plain_architecture, residual_stream

Top = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From logits [n, vocab_size] to the most probable tokens and their probabilities, each [n, top_k]."""


@dataclass(frozen=True)
class Observed:
    """What the model computed for the tokens of one sequence, from its first one on.

    Attributes:
        ids: The tokens, int32 [num_tokens].
        hidden: Hidden states after so many layers, each [num_tokens, hidden_size].
        final: After the last layer and the final norm, [num_tokens, hidden_size].
        top: Position to its most probable next tokens and their probabilities, each [top_k], of tokens that vLLM
            sampled after: the last one of a prompt and every one of an answer.
    """

    ids: torch.Tensor
    hidden: dict[int, torch.Tensor]
    final: torch.Tensor
    top: dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence that were fed in one step; views into the step's tensors."""

    ids: torch.Tensor
    hidden: dict[int, torch.Tensor]
    final: torch.Tensor


class Observing:
    """One sequence while it runs."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._top: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, position: int, piece: Piece) -> None:
        """Take note of tokens from ``position`` on; a sequence that was preempted begins again at 0."""
        if position == 0:
            self._pieces = []
        self._pieces.append(piece)

    def sampled_after(self, position: int, ids: torch.Tensor, p: torch.Tensor) -> None:
        """Take note of the most probable tokens after ``position``."""
        self._top[position] = ids, p

    def observed(self) -> Observed:
        """Return all of it."""
        pieces = self._pieces
        return Observed(
            torch.cat([piece.ids for piece in pieces]),
            {layer: torch.cat([piece.hidden[layer] for piece in pieces]) for layer in pieces[0].hidden},
            torch.cat([piece.final for piece in pieces]),
            self._top,
        )


class RecordingMixin(ExitMixin):
    """A model that runs as segments and, when told to, keeps what passes its cuts, sequence by sequence."""

    layers: tuple[int, ...] = ()
    """Numbers of layers after which the hidden state is kept."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._runner: Any = None
        self.cut(self.layers)

    def record(self, runner: Any, top: Top) -> None:
        """Keep what ``runner``, the V1 model runner of this model, runs from now on, and ``top`` of its logits."""
        self._runner, self._top = runner, top
        self._running: dict[str, Observing] = {}
        self._ends: list[tuple[Observing, int]] = []

    def take(self, request_id: str) -> Observed:
        """Return what was kept of a sequence, and keep it no longer."""
        return self._running.pop(request_id).observed()

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Run all segments; keep what they compute if told to."""
        self._hidden: dict[int, torch.Tensor] = {}
        final = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        if self._runner is not None:
            assert input_ids is not None
            assert isinstance(final, torch.Tensor)
            self._note(input_ids, positions, final)
        return final

    def at_cut(self, layer: int, state: IntermediateTensors) -> None:
        """Keep the hidden states after ``layer`` layers."""
        if self._runner is not None:
            self._hidden[layer] = residual_stream(state)

    def _note(self, input_ids: torch.Tensor, positions: torch.Tensor, final: torch.Tensor) -> None:
        """Take note of a step, request by request."""
        batch = self._runner.input_batch
        edges = self._runner.query_start_loc.np[: batch.num_reqs + 1].tolist()
        # Graphs and vLLM reuse their buffers, so copies are kept.
        ids, at = input_ids.to("cpu", torch.int32, copy=True), positions.tolist()
        hidden = {layer: _kept(states) for layer, states in self._hidden.items()}
        states = _kept(final)
        self._ends = []
        for request_id, (start, end) in zip(batch.req_ids, pairwise(edges), strict=True):
            part = slice(start, end)
            piece = Piece(ids[part], {layer: h[part] for layer, h in hidden.items()}, states[part])
            observing = self._running.setdefault(request_id, Observing())
            observing.add(at[start], piece)
            self._ends.append((observing, at[end - 1]))

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return logits; after a step that is kept, keep the most probable tokens that they give each request."""
        logits = super().compute_logits(hidden_states)
        if self._runner is not None and self._ends:
            assert logits is not None
            ids, p = self._top(logits)
            for (observing, position), row_ids, row_p in zip(self._ends, ids, p, strict=True):
                observing.sampled_after(position, row_ids, row_p)
            self._ends = []
        return logits


def _kept(states: torch.Tensor) -> torch.Tensor:
    return states.to("cpu", copy=True)


def register_recorder(architectures: Sequence[str], layers: Sequence[int]) -> str:
    """Make a recording version of a model's architecture known to vLLM in this process; return its name.

    Raises:
        EarlyExitError: there is none.
    """
    from vllm import ModelRegistry

    plain = plain_architecture(architectures)
    base = getattr(import_module(BASES[plain]), plain)
    name = f"Recording{plain}"
    ModelRegistry.register_model(name, type(name, (RecordingMixin, base), {"layers": tuple(layers)}))
    return name
