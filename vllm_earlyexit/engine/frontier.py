"""The depth frontier: which tokens of which sequences stand at the cut, waiting to be verified.

Drafting feeds a sequence's newest token through the layers below the cut; from then on that token is *pending*: its
hidden state is known, its KV below the cut is written, its KV above is not. The frontier holds these tokens while a
round of drafting lasts. It knows nothing of runners, models or devices beyond the tensors it is given.
"""

from dataclasses import dataclass

import torch


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
    """One round of drafting over a batch of sequences.

    Args:
        last_tokens: The newest token of each sequence, int32 [num_seqs]; no KV is written for it yet.
        positions: Its position, int64 [num_seqs].
        limits: How many tokens each sequence may draft at most, int64 [num_seqs]; 0 keeps it out of the round.
    """

    def __init__(self, last_tokens: torch.Tensor, positions: torch.Tensor, limits: torch.Tensor):
        self._first = positions
        self._limits = limits
        self._drafts: list[list[int]] = [[] for _ in range(len(last_tokens))]
        self._step = self._next(torch.arange(len(last_tokens), device=last_tokens.device), last_tokens, positions)

    def _next(self, rows: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> Step:
        room = positions - self._first[rows] < self._limits[rows]
        return Step(rows[room], tokens[room], positions[room])

    @property
    def step(self) -> Step | None:
        """The tokens to feed next, or None when the round is over."""
        return self._step if len(self._step.rows) else None

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
            self._drafts[row].append(token)
        self._step = self._next(rows, tokens, step.positions[kept] + 1)

    def drafts(self) -> list[list[int]]:
        """Return the drafted tokens of each sequence, possibly none."""
        return self._drafts
