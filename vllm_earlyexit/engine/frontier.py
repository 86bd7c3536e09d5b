"""The depth frontier: which tokens of which sequences stand at which cut, waiting for the layers above it.

Drafting feeds a sequence's newest token through the layers below a cut; from then on that token is *pending*: its
hidden state is known, its KV below the cut is written, its KV above is not. Where a token is unsure, its sequence may
be lifted: all its tokens that are pending at this cut go on to the next one. The frontier keeps these tokens and their
hidden states from the start of a round of drafting until the forward pass that verifies them. It knows nothing of
runners, models or devices beyond the tensors it is given.
"""

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Standing:
    """Pending tokens of some sequences that stand at the same cut: of each one its newest ones, one after the other.

    Attributes:
        rows: The sequences, int64 [n].
        counts: Tokens of each, int64 [n].
        positions: Of the tokens, int64 [num_tokens].
        states: Their hidden states at the cut by name, each [num_tokens, hidden_size].
    """

    rows: torch.Tensor
    counts: torch.Tensor
    positions: torch.Tensor
    states: dict[str, torch.Tensor]

    @property
    def newest(self) -> torch.Tensor:
        """Index of each sequence's newest token among the tokens, int64 [n]."""
        return self.counts.cumsum(0) - 1


class Frontier:
    """One round of drafting over a batch of sequences, and what is pending after it.

    Args:
        last_tokens: The newest token of each sequence, int32 [num_seqs]; no KV is written for it yet.
        positions: Its position, int64 [num_seqs].
        limits: How many tokens each sequence may draft at most, int64 [num_seqs]; 0 keeps it out of the round.
    """

    def __init__(self, last_tokens: torch.Tensor, positions: torch.Tensor, limits: torch.Tensor):
        self._first = positions
        self._limits = limits
        self._tokens: list[list[int]] = [[token] for token in last_tokens.tolist()]
        self._cuts: list[list[int]] = [[] for _ in self._tokens]
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

    def keep(self, at_cut: States, cut: int) -> None:
        """Keep the hidden states of the current step's tokens, which are pending at ``cut`` from now on."""
        step = self._step
        columns = step.positions - self._first[step.rows]
        for name, states in at_cut.items():
            if name not in self._states:
                shape = (len(self._tokens), self._longest, *states.shape[1:])
                self._states[name] = torch.empty(shape, dtype=states.dtype, device=states.device)
            self._states[name][step.rows, columns] = states
        for row in step.rows.tolist():
            self._cuts[row].append(cut)

    def standing(self, rows: torch.Tensor, cut: int) -> Standing:
        """Return the tokens of ``rows``, int64 [n], that are pending at ``cut``; each row's newest one is."""
        counts = torch.tensor([self._cuts[row].count(cut) for row in rows.tolist()], device=rows.device)
        ends = torch.tensor([len(self._cuts[row]) for row in rows.tolist()], device=rows.device)
        each = rows.repeat_interleave(counts)
        within = torch.arange(len(each), device=rows.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        columns = (ends - counts).repeat_interleave(counts) + within
        return Standing(rows, counts, self._first[each] + columns, self.states(each, columns))

    def lift(self, standing: Standing, at_cut: States, cut: int) -> None:
        """Take note that ``standing`` has gone on to ``cut``, where its hidden states are ``at_cut``."""
        each = standing.rows.repeat_interleave(standing.counts)
        for name, states in at_cut.items():
            self._states[name][each, standing.positions - self._first[each]] = states
        for row, count in zip(standing.rows.tolist(), standing.counts.tolist(), strict=True):
            self._cuts[row][-count:] = [cut] * count

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

    def copy(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Draft these tokens for some sequences behind what they have drafted, and take them out of the round."""
        for row, tokens in drafts.items():
            self._tokens[row] += tokens
        step = self._step
        others = torch.tensor([row not in drafts for row in step.rows.tolist()], dtype=torch.bool).to(step.rows.device)
        self._step = Step(step.rows[others], step.input_ids[others], step.positions[others])

    def drafts(self) -> list[list[int]]:
        """Return the drafted tokens of each sequence, possibly none."""
        return [tokens[1:] for tokens in self._tokens]

    def pending(self, row: int) -> list[int]:
        """Return the pending tokens of a sequence, from its newest token on."""
        return self._tokens[row][: len(self._cuts[row])]

    def cuts(self, row: int) -> list[int]:
        """Return at which cut each pending token of a sequence stands; it never rises from token to token."""
        return self._cuts[row]

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
