"""The depth frontier: which tokens of which sequences stand at a cut, waiting for the layers above it.

Drafting feeds a sequence's newest token through the layers below the cut; from then on that token is *pending*: its
hidden state is known, its KV below the cut is written, its KV above is not. The frontier keeps these tokens and their
hidden states from the start of a round of drafting until the forward pass that verifies them. It knows nothing of
runners, models or devices beyond the tensors it is given.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

States = Mapping[str, torch.Tensor]
"""Hidden states at a cut by name, as vLLM's ``IntermediateTensors`` has them, each [num_tokens, hidden_size]."""


@dataclass(frozen=True)
class Step:
    """The tokens to feed next, one per sequence that still drafts.

    Attributes:
        rows: The sequences, as indices into the round, int64 [n].
        input_ids: The tokens to feed, int32 [n].
        positions: Their positions, int64 [n].
    """

    rows: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor


class Frontier:
    """One round of drafting over a batch of sequences, and what is pending after it.

    Args:
        last_tokens: The newest token of each sequence, int32 [num_seqs]; no KV is written for it yet.
        positions: Its position, int64 [num_seqs].
        limits: How many tokens each sequence may draft at most, int64 [num_seqs]; 0 keeps it out of the round.
    """

    def __init__(self, last_tokens: torch.Tensor, positions: torch.Tensor, limits: torch.Tensor):
        self.cut = 0
        """At which exit its tokens are pending, as whoever drafts numbers them."""
        self._first = positions
        self._limits = limits
        self._tokens: list[list[int]] = [[token] for token in last_tokens.tolist()]
        self._fed = [0] * len(self._tokens)
        self._longest = int(limits.max()) + 1 if len(limits) else 0
        self._states: dict[str, torch.Tensor] = {}
        self._step = self._next(torch.arange(len(last_tokens), device=last_tokens.device), last_tokens, positions)

    def _next(self, rows: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> Step:
        room = positions - self._first[rows] < self._limits[rows]
        return Step(rows[room], tokens[room], positions[room])

    @property
    def step(self) -> Step | None:
        """The tokens to feed next, or None when the round is over."""
        return self._step if len(self._step.rows) else None

    @property
    def num_seqs(self) -> int:
        """Number of sequences in the round, those that may not draft included."""
        return len(self._tokens)

    def keep(self, at_cut: States) -> None:
        """Keep the hidden states of the current step's tokens, which are pending from now on."""
        step = self._step
        columns = step.positions - self._first[step.rows]
        for name, states in at_cut.items():
            if name not in self._states:
                shape = (len(self._tokens), self._longest, *states.shape[1:])
                self._states[name] = torch.empty(shape, dtype=states.dtype, device=states.device)
            self._states[name][step.rows, columns] = states
        for row in step.rows.tolist():
            self._fed[row] += 1

    def advance(self, drafted: torch.Tensor, keep: torch.Tensor) -> None:
        """Record what the exit head says after the current step.

        Args:
            drafted: The head's choice for each row of the step, int [n].
            keep: Whether it is sure enough to be drafted, bool [n]; a sequence stops at its first False.
        """
        step = self._step
        kept = keep.nonzero().squeeze(-1)
        rows, tokens = step.rows[kept], drafted[kept].to(step.input_ids.dtype)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self._tokens[row].append(token)
        self._step = self._next(rows, tokens, step.positions[kept] + 1)

    def drafts(self) -> list[list[int]]:
        """Return the drafted tokens of each sequence, possibly none."""
        return [tokens[1:] for tokens in self._tokens]

    def pending(self, row: int) -> list[int]:
        """Return the pending tokens of a sequence, from its newest token on."""
        return self._tokens[row][: self._fed[row]]

    def states(self, rows: torch.Tensor, columns: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return hidden states at the cut by name, each [n, hidden_size].

        Args:
            rows: Sequences, int64 [n].
            columns: Which of the row's pending tokens, int64 [n].
        """
        return {name: kept[rows, columns] for name, kept in self._states.items()}

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of each of the kept tensors: [num_seqs, longest draft + 1, hidden_size]; empty if there are none."""
        return next((tuple(kept.shape) for kept in self._states.values()), ())
