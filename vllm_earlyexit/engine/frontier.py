"""The depth frontier: which tokens of which sequences stand at which cut, waiting for the layers above it.

Drafting feeds a sequence's newest token through the layers below a cut; from then on that token is *pending*: its
hidden state is known, its KV below the cut is written, its KV above is not. Where a token is unsure, its sequence may
be lifted: all its tokens that are pending at this cut go on to the next one. The frontier keeps these tokens and their
hidden states from the start of a round of drafting until the forward pass that verifies them. It knows nothing of
runners, models or devices beyond the tensors it is given.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from vllm_earlyexit.engine.early_exit import Left

States = Mapping[str, torch.Tensor]
"""Hidden states at a cut by name, as vLLM's ``IntermediateTensors`` has them, each [num_tokens, hidden_size]."""


NONE: Mapping[int, Left] = MappingProxyType({})


@dataclass(frozen=True)
class Step:
    """The tokens to feed next, one per sequence that still drafts.

    Attributes:
        rows: The sequences, as indices into the round, int64 [n].
        input_ids: The tokens to feed, int32 [n].
        positions: Their positions, int64 [n], on the host.
    """

    rows: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class Standing:
    """Pending tokens of some sequences that stand at the same cut: of each one its newest ones, one after the other.

    Attributes:
        rows: The sequences.
        counts: Tokens of each, int64 [n], on the host.
        positions: Of the tokens, int64 [num_tokens], on the host.
        places: Where the frontier keeps their hidden states, int64 [num_tokens].
        states: These, at the cut, by name, each [num_tokens, hidden_size].
    """

    rows: Sequence[int]
    counts: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    states: dict[str, torch.Tensor]

    @property
    def newest(self) -> torch.Tensor:
        """Index of each sequence's newest token among the tokens, int64 [n]."""
        return self.counts.cumsum(0) - 1


class Frontier:
    """One round of drafting over a batch of sequences, and what is pending after it.

    Its books are kept in lists: at the few sequences of a step they cost much less than tensors.

    Args:
        last_tokens: The newest token of each sequence; no KV is written for it yet.
        positions: Its position.
        limits: How many tokens each sequence may draft at most; 0 keeps it out of the round.
        device: Where steps are run.
    """

    def __init__(
        self, last_tokens: Sequence[int], positions: Sequence[int], limits: Sequence[int], device: torch.device | str
    ):
        self._first, self._limits, self._device = positions, limits, device
        self._tokens: list[list[int]] = [[token] for token in last_tokens]
        self._cuts: list[list[int]] = [[] for _ in self._tokens]
        self._left: list[dict[int, Left]] = [{} for _ in self._tokens]
        self._columns = max(limits, default=-1) + 1
        self._states: dict[str, torch.Tensor] = {}
        self._go_on([row for row, limit in enumerate(limits) if limit > 0])

    def _go_on(self, rows: list[int]) -> None:
        """Take note of which sequences still draft."""
        self._rows = rows
        self._step: Step | None = None

    @property
    def step(self) -> Step | None:
        """The tokens to feed next, or None when the round is over."""
        rows = self._rows
        if self._step is None and rows:
            positions = [self._first[row] + len(self._tokens[row]) - 1 for row in rows]
            self._step = Step(
                self._tensor(rows),
                self._tensor([self._tokens[row][-1] for row in rows], torch.int32),
                torch.tensor(positions),
            )
        return self._step

    @property
    def drafting(self) -> Sequence[int]:
        """The sequences that still draft."""
        return self._rows

    def ahead(self, count: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield which sequences would feed a token in each of the next steps, and where, if they stop at limits only.

        Args:
            count: How many steps at most.

        Yields:
            The sequences, and the positions of their tokens, int64 [n], on the host.
        """
        for later in range(count):
            rows = [row for row in self._rows if len(self._tokens[row]) + later <= self._limits[row]]
            if not rows:
                return
            yield rows, torch.tensor([self._first[row] + len(self._tokens[row]) - 1 + later for row in rows])

    def _tensor(self, values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    @property
    def num_seqs(self) -> int:
        """Number of sequences in the round, those that may not draft included."""
        return len(self._tokens)

    def keep(self, at_cut: States, cut: int) -> None:
        """Keep the hidden states of the current step's tokens, which are pending at ``cut`` from now on."""
        self._put(self._tensor([row * self._columns + len(self._cuts[row]) for row in self._rows]), at_cut)
        for row in self._rows:
            self._cuts[row].append(cut)

    def _put(self, places: torch.Tensor, at_cut: States) -> None:
        for name, states in at_cut.items():
            if name not in self._states:
                shape = (len(self._tokens) * self._columns, *states.shape[1:])
                self._states[name] = torch.empty(shape, dtype=states.dtype, device=states.device)
            self._states[name].index_copy_(0, places, states)

    def standing(self, rows: Sequence[int], cut: int) -> Standing:
        """Return the tokens of ``rows`` that are pending at ``cut``; each row's newest one is."""
        counts = [self._cuts[row].count(cut) for row in rows]
        ends = [len(self._cuts[row]) for row in rows]
        each = [
            (row, column)
            for row, count, end in zip(rows, counts, ends, strict=True)
            for column in range(end - count, end)
        ]
        return Standing(
            rows=rows,
            counts=torch.tensor(counts),
            positions=torch.tensor([self._first[row] + column for row, column in each]),
            places=(places := self._tensor([row * self._columns + column for row, column in each])),
            states=self._get(places),
        )

    def _get(self, places: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: kept.index_select(0, places) for name, kept in self._states.items()}

    def lift(self, standing: Standing, at_cut: States, cut: int) -> None:
        """Take note that ``standing`` has gone on to ``cut``, where its hidden states are ``at_cut``."""
        self._put(standing.places, at_cut)
        for row, count in zip(standing.rows, standing.counts.tolist(), strict=True):
            self._cuts[row][-count:] = [cut] * count

    def advance(self, drafted: torch.Tensor, keep: torch.Tensor, left: Mapping[int, Left] = NONE) -> None:
        """Record what the exit head says after the current step.

        Args:
            drafted: The head's choice for each row of the step, int [n].
            keep: Whether it is sure enough to be drafted, bool [n]; a sequence stops at its first False.
            left: Rows whose token is kept and leaves: it is not drafted but final.
        """
        for row, token in left.items():
            self._left[row][len(self._tokens[row]) - 1] = token
        kept = [item for item in zip(self._rows, drafted.tolist(), keep.tolist(), strict=True) if item[2]]
        for row, token, _ in kept:
            self._tokens[row].append(token)
        self._go_on([row for row, *_ in kept if len(self._tokens[row]) <= self._limits[row]])

    def copy(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Draft these tokens for some sequences behind what they have drafted, and take them out of the round."""
        if not drafts:
            return
        for row, tokens in drafts.items():
            self._tokens[row] += tokens
        self._go_on([row for row in self._rows if row not in drafts])

    def drafts(self) -> list[list[int]]:
        """Return the drafted tokens of each sequence, possibly none."""
        return [self.draft(row) for row in range(len(self._tokens))]

    def draft(self, row: int) -> list[int]:
        """Return the drafted tokens of a sequence, possibly none."""
        return self._tokens[row][1:]

    def left(self, row: int) -> Mapping[int, Left]:
        """Return which tokens of a sequence's draft, counted from 0, are final if all before them are kept."""
        return self._left[row]

    def pending(self, row: int) -> list[int]:
        """Return the pending tokens of a sequence, from its newest token on."""
        return self._tokens[row][: len(self._cuts[row])]

    def cuts(self, row: int) -> list[int]:
        """Return at which cut each pending token of a sequence stands; it never rises from token to token."""
        return self._cuts[row]

    def states(self, pending: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Return hidden states at the cut by name, each [n, hidden_size], of n tokens.

        Args:
            pending: Of each token its sequence, and which of the sequence's pending tokens it is.
        """
        return self._get(self._tensor([row * self._columns + column for row, column in pending]))

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of each of the kept tensors: [num_seqs, longest draft + 1, hidden_size]; empty if there are none."""
        kept = next(iter(self._states.values()), None)
        return () if kept is None else (len(self._tokens), self._columns, *kept.shape[1:])


def of_rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return ``table[rows]`` for rows that rise, without a copy if they are all."""
    return table if len(rows) == len(table) else table[rows]
