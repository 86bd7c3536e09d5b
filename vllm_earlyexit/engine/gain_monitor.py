"""Whether drafting pays, by what rounds with and without drafts really took."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Kind = Literal["heads", "copies"]
"""Of a draft: what an exit head was asked for, or what was only copied from the sequence itself."""

MARGIN = 0.05
"""Share by which drafting must be faster than plain decoding; less than that is not worth the risk."""
SIMILAR, SHORT_CONTEXT = 1.5, 256
"""Ratio of batch sizes from which on one says little of the other, and tokens up to which contexts are alike."""
WARM_UP = 6
"""Rounds at first, in which kernels are made and nothing is compared; nothing is drafted in every second one."""
PROBES, PROBE_FIRST, PROBE_IN_DOUBT, PROBE_LATER = 8, 2, 8, 192
"""Rounds with drafts after which one without shows what a plain one takes: often at first."""
TOLERATED = 0.01
"""Share of a plain round's time that it need not be known any better than."""
RECENT, STRETCH = 63, 8
"""Values whose median counts, and rounds with drafts that one plain round is compared with."""
SEEN, SEEN_DRAFTS, CERTAIN = 4, 8, 1.5
"""Comparisons and rounds with drafts before they count, and by how many standard errors drafting must fall short."""
AT_ONCE = 0.5
"""Share by which drafting must be seen to be slower for half as much to be enough at first."""
TRY, RETRY, RISK = 2, 32, 0.004
"""Rounds of a try where drafting is off, rounds between tries at least, and the share of time that tries may cost."""
LASTING = 1024
"""Rounds for which what was seen counts."""
SATURATED = 8
"""Rounds in a row that had prompts in their step, from which on such rounds are compared with one another."""


@dataclass
class Mean:
    """The mean of the last values, and its standard error.

    Attributes:
        values: The values, and in which round each was noted.
        total: Their sum.
        squares: That of their squares.
    """

    values: deque[tuple[int, float]] = field(default_factory=deque)
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float, now: int) -> None:
        """Take note of a value."""
        self.values.append((now, value))
        self._count(value, 1)
        if self.count > RECENT * STRETCH:
            self._drop()

    def forget(self, before: int) -> None:
        """Forget the values of rounds before this one, but for the last few."""
        while self.count > SEEN_DRAFTS and self.values[0][0] < before:
            self._drop()

    def _drop(self) -> None:
        self._count(self.values.popleft()[1], -1)

    def _count(self, value: float, times: int) -> None:
        self.total += times * value
        self.squares += times * value * value

    @property
    def count(self) -> int:
        """How many values there are."""
        return len(self.values)

    @property
    def value(self) -> float:
        """The mean; there must be a value."""
        return self.total / self.count

    @property
    def error(self) -> float:
        """The mean's standard error, as if two values more had stood one off it: a few that are alike are few."""
        return math.sqrt(max(0.0, self.squares / self.count - self.value**2 + 2 / self.count) / self.count)


@dataclass
class Recent:
    """The median of the last values, and its standard error: one round that was disturbed moves it little.

    Attributes:
        values: The values, and in which round each was noted.
    """

    values: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    _summary: tuple[float, float] | None = None

    def add(self, value: float, now: int) -> None:
        """Take note of a value."""
        self.values.append((now, value))
        self._summary = None

    def forget(self, before: int) -> None:
        """Forget the values of rounds before this one, but for the last few."""
        while len(self.values) > SEEN and self.values[0][0] < before:
            self.values.popleft()
            self._summary = None

    @property
    def count(self) -> int:
        """How many values there are."""
        return len(self.values)

    @property
    def value(self) -> float:
        """The median; there must be a value."""
        return self._summarized()[0]

    @property
    def error(self) -> float:
        """The median's standard error, by the median deviation of normally distributed values."""
        return self._summarized()[1] if len(self.values) >= SEEN else math.inf

    def _summarized(self) -> tuple[float, float]:
        """Return the median and its standard error; rounds ask far more often than values come."""
        if self._summary is None:
            values = np.array([value for _, value in self.values])
            median = float(np.median(values))
            spread = 1.4826 * float(np.median(np.abs(values - median)))
            self._summary = median, 1.2533 * spread / math.sqrt(len(values))
        return self._summary


@dataclass
class Gain:
    """What was seen of rounds with one kind of draft. Tokens are those of one sequence.

    Attributes:
        tokens: Of a round.
        expected: What drafting was expected to be worth at the start of a round, in tokens.
        instead: How many plain rounds fit into the time of one, each time by rounds next to each other: a machine's
            speed changes.
        stretch: Times of the last rounds that were not compared yet.
        resume: The round when drafting is tried again, once it is stopped.
    """

    tokens: Mean = field(default_factory=Mean)
    expected: Mean = field(default_factory=Mean)
    instead: Recent = field(default_factory=Recent)
    stretch: deque[float] = field(default_factory=lambda: deque(maxlen=STRETCH))
    resume: int = 0

    def add(self, tokens: float, time: float, expected: float, now: int) -> None:
        """Take note of a round."""
        self.tokens.add(tokens, now)
        self.expected.add(expected, now)
        self.stretch.append(time)

    def forget(self, before: int) -> None:
        """Forget what was seen before this round, but for the last of it."""
        for seen in (self.tokens, self.expected, self.instead):
            seen.forget(before)

    def compare(self, plain: float, now: int) -> None:
        """Compare the rounds since the last plain one with it."""
        if self.stretch:
            self.instead.add(sum(self.stretch) / len(self.stretch) / plain, now)
            self.stretch.clear()

    @property
    def known(self) -> bool:
        """Whether there were enough rounds to compare."""
        return self.instead.count >= SEEN and self.tokens.count >= SEEN_DRAFTS

    def gain(self) -> tuple[float, float]:
        """Return how many tokens a round yields beyond plain decoding, and the standard error of that."""
        return self.tokens.value - self.instead.value, math.hypot(self.tokens.error, self.instead.error)

    def in_doubt(self) -> bool:
        """Say whether times are known too badly to tell the gain."""
        return self.known and self.instead.error > max(abs(self.gain()[0]) / CERTAIN, TOLERATED)

    def realized(self) -> float:
        """Return which share of what drafting was expected to be worth has come true, 0 to 1; 1 if it is not known."""
        if not self.known or self.expected.value <= 0:
            return 1.0
        return min(1.0, max(0.0, self.gain()[0] / self.expected.value))

    def drafts(self, now: int) -> bool:
        """Say whether to draft in this round: not while that turned out not to be faster, but for tries."""
        gain, error = self.gain() if self.known else (0.0, math.inf)
        if gain > MARGIN - CERTAIN * error and not self._loses_at_once():
            self.resume = now + RETRY
            return True
        if now < self.resume:
            return False
        if now >= self.resume + TRY - 1:
            self.resume = now + max(RETRY, int(TRY * -gain / RISK))
        return True

    def _loses_at_once(self) -> bool:
        """Say whether the first few comparisons leave no doubt that drafting is much slower."""
        few = not self.known and 2 * self.instead.count >= SEEN and 2 * self.tokens.count >= SEEN_DRAFTS
        return few and self.tokens.value - self.instead.value < -AT_ONCE


@dataclass
class Seen:
    """What was seen of rounds that are alike. Times are relative to what a plain step was measured to take.

    Attributes:
        plain: Time of a round in which nothing was drafted.
        of: Of rounds with each kind of draft.
        rounds: Rounds so far.
        waiting: Rounds with drafts that were not compared with a plain one yet.
        probes: Plain rounds that some were compared with.
    """

    plain: Recent = field(default_factory=Recent)
    of: dict[Kind, Gain] = field(default_factory=lambda: {"heads": Gain(), "copies": Gain()})
    rounds: int = 0
    waiting: int = 0
    probes: int = 0

    def start(self, kinds: Iterable[Kind]) -> frozenset[Kind]:
        """Start a round; return which of these kinds to draft in it."""
        self.rounds += 1
        for gain in self.of.values():
            gain.forget(self.rounds - LASTING)
        if self._probe():
            return frozenset()
        return frozenset(kind for kind in kinds if self.of[kind].drafts(self.rounds))

    @property
    def warming_up(self) -> bool:
        """Whether these are the first rounds of their kind, in which kernels are made."""
        return self.rounds <= WARM_UP

    def _probe(self) -> bool:
        """Say whether to draft nothing in this round, to see what a plain one takes: often while that is in doubt."""
        if self.warming_up:
            return self.rounds % 2 == 0
        every = PROBE_FIRST
        if self.probes >= PROBES:
            doubtful = any(gain.in_doubt() for gain in self.of.values())
            every = PROBE_IN_DOUBT if doubtful else PROBE_LATER
        return self.waiting >= every

    def add_plain(self, time: float) -> None:
        """Take note of a round in which nothing was drafted."""
        if self.warming_up:
            return
        self.plain.add(time, self.rounds)
        self.probes += self.waiting > 0
        self.waiting = 0
        for gain in self.of.values():
            gain.compare(time, self.rounds)

    def add(self, kind: Kind, tokens: float, time: float, expected: float = 0.0) -> None:
        """Take note of a round with a draft.

        Args:
            kind: Of the draft.
            tokens: Of one sequence, without those that another kind of draft beside it yielded.
            time: Likewise.
            expected: See ``Gain``.
        """
        if not self.warming_up:
            self.waiting += 1
            self.of[kind].add(tokens, time, expected, self.rounds)


class GainMonitor:
    """What was seen of all rounds, by how many sequences, how much context, and whether prompts come all the time."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int, bool], Seen] = {}
        self._prompts = 0

    def note_prompts(self, there_were: bool) -> bool:
        """Take note of whether a round's step had prompts in it; return whether what it took can be compared.

        Beside prompts a round takes much longer, so such rounds are left out. Where hardly any are without, they are
        compared with one another.
        """
        self._prompts = self._prompts + 1 if there_were else 0
        return not there_were or self.saturated

    @property
    def saturated(self) -> bool:
        """Whether prompts come all the time."""
        return self._prompts >= SATURATED

    def of(self, num_seqs: int, context: int) -> Seen:
        """Return what was seen of rounds like one of so many sequences, of so many tokens each."""
        length = round(math.log2(max(context, SHORT_CONTEXT) / SHORT_CONTEXT))
        return self._seen.setdefault((alike(num_seqs), length, self.saturated), Seen())


def alike(num_seqs: int) -> int:
    """Return a number that batches of similar size have in common."""
    return round(math.log(num_seqs, SIMILAR))
