"""What the parts of a step cost on the machine that serves, and what drafting is worth at these costs."""

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_earlyexit.engine.lookup import LONGEST
from vllm_earlyexit.heads.checkpoint import write_whole

logger = logging.getLogger("vllm.earlyexit")

DRIFT = 0.2
"""Share by which a step may have become slower or faster until kept times do not hold any more."""
TRIES = 2
"""How often times are taken until they are those of a quiet machine."""
REPEATS, FEWEST, ENOUGH = 7, 3, 10.0
"""Runs of each size, and how few there may be once they have taken so many seconds."""
PLENTY = 8.0
"""Times what one token takes from which on larger sizes are not timed: what they take more rises with their number."""
UNSTEADY = 1.5
"""Median over fastest run of a size from which on something ran beside it."""
MEASURED_CONTEXT, LONG_CONTEXT, COARSER = 256, 8192, 1.25
"""Tokens of context at which parts are timed, those at which attention's share is, and ratio of contexts told apart."""
MORE = 8
"""Tokens of one sequence at which attention's share is timed."""
SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 128)
"""Numbers of tokens at which the parts of a step are timed."""


PARTS = ("shallow", "head", "deep", "plain")


@dataclass(frozen=True)
class StepTimes:
    """Seconds that the parts of a step take for n tokens, measured at start-up.

    Attributes:
        sizes: Numbers of tokens n, rising.
        shallow: The layers below the cut.
        head: What drafting adds to feeding n tokens below the cut: exit head, choice, entropy, bookkeeping.
        deep: The layers above the cut, and lm_head for every token.
        plain: One plain decoding step of n sequences without vLLM's own work around the model. More sequences may take
            less, where kernels are better at their number; the other parts are given as if filled up to it.
        attention: What each of these four takes longer for one more token, for each token of context beyond
            ``MEASURED_CONTEXT``.
        context: Tokens of context of each sequence, rounded, that these times are for.
    """

    sizes: tuple[int, ...]
    shallow: tuple[float, ...]
    head: tuple[float, ...]
    deep: tuple[float, ...]
    plain: tuple[float, ...]
    attention: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    context: int = MEASURED_CONTEXT

    def at_context(self, tokens: int) -> "StepTimes":
        """Return the times where each sequence has so many tokens of context."""
        if tokens < COARSER * MEASURED_CONTEXT or not any(self.attention):
            return self
        return self._at_power(round(math.log(tokens / MEASURED_CONTEXT, COARSER)))

    @functools.cached_property
    def _at_power(self) -> "Callable[[int], StepTimes]":
        """Return the times for a context that is so many times ``COARSER`` as long as the measured one."""

        @functools.cache
        def longer(power: int) -> StepTimes:
            context = round(MEASURED_CONTEXT * COARSER**power)
            sizes = np.array(self.sizes)
            added = [(context - MEASURED_CONTEXT) * each * sizes for each in self.attention]
            shallow, head, deep, plain = (
                tuple((np.array(getattr(self, part)) + more).tolist()) for part, more in zip(PARTS, added, strict=True)
            )
            return StepTimes(self.sizes, shallow, head, deep, plain, context=context)

        return longer

    def at(self, part: str, n: np.ndarray | int) -> np.ndarray:
        """Return a part's seconds for n tokens: linear between the measured sizes and beyond the last; 0 for none."""
        table = self._tables[part]
        last = len(table) - 1
        if isinstance(n, int):
            return table[n] if n <= last else table[last] + (n - last) * (table[last] - table[last - 1])
        return table[np.minimum(n, last)] + np.maximum(0, n - last) * (table[last] - table[last - 1])

    def spare(self, n: np.ndarray | int) -> np.ndarray:
        """Return the seconds that a step of n tokens takes longer than the fastest of at least as many."""
        return self._spare[np.minimum(n, len(self._spare) - 1)]

    @functools.cached_property
    def _spare(self) -> np.ndarray:
        plain = self._tables["plain"][1:]
        return np.append(0.0, plain - np.minimum.accumulate(plain[::-1])[::-1])

    @functools.cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        return {part: self._table(getattr(self, part)) for part in PARTS}

    def _table(self, times: tuple[float, ...]) -> np.ndarray:
        """Return the seconds for 0 tokens, 1 token, and so on, to the first size behind the last measured one."""
        slope = (times[-1] - times[-2]) / (self.sizes[-1] - self.sizes[-2]) if len(self.sizes) > 1 else 0.0
        table = np.interp(np.arange(self.sizes[-1] + 2), self.sizes, times)
        table[0], table[-1] = 0.0, times[-1] + max(0.0, slope)
        return table


Attention = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class PartTimes:
    """Seconds of everything a step may consist of, as measured.

    Attributes:
        sizes: Numbers of tokens n, rising.
        parts: Seconds at each size, for the layers up to the first exit, the head there, the layers up to the next
            exit, the head there, and so on; the layers above the last exit with lm_head; and a plain step.
        attention: What each part takes longer for each token of context, for the first token of a sequence and for one
            more beside it.
    """

    sizes: tuple[int, ...]
    parts: tuple[tuple[float, ...], ...]
    attention: Attention

    @classmethod
    def of(cls, kept: dict[str, Any]) -> "PartTimes":
        """Return the times that ``asdict`` and JSON have made this of; raises what is missing or has another shape."""
        first, more = kept["attention"]
        return cls(tuple(kept["sizes"]), tuple(map(tuple, kept["parts"])), (tuple(first), tuple(more)))

    def of_exit(self, number: int) -> StepTimes:
        """Return the times of a step that drafts from the ``number``-th exit, counted from 0."""
        *run, plain = self.parts
        layers, heads = np.array(run[::2]), run[1::2]
        shallow, deep = layers[: number + 1].sum(axis=0), layers[number + 1 :].sum(axis=0)
        first, more = np.array(self.attention)
        attention = (
            float(first[:-1:2][: number + 1].sum()),
            float(first[1:-1:2][number]),
            float(more[:-1:2][number + 1 :].sum()),
            float(first[-1]),
        )
        return StepTimes(self.sizes, tuple(shallow.tolist()), heads[number], tuple(deep.tolist()), plain, attention)


@dataclass(frozen=True)
class Shape:
    """Tokens that parts are timed for.

    Attributes:
        tokens: How many.
        context: Position of the last one in its sequence, counted from 1.
        spread: Whether they belong to as many sequences as there may be, instead of one.
    """

    tokens: int
    context: int = MEASURED_CONTEXT
    spread: bool = True


Run = Callable[[Shape], list[float]]
"""Runs all parts over some tokens in the order of ``PartTimes`` and returns the seconds of each."""


def measure(run: Run, longest: int, most_context: int = MEASURED_CONTEXT) -> tuple[PartTimes, bool]:
    """Time every part at every size up to ``longest`` tokens.

    Args:
        run: See ``Run``. Run over and over by itself, a part would find its weights in a cache that others empty in
            between.
        longest: The largest size that can be run.
        most_context: The longest context that can be.

    Returns:
        The times, and whether the machine had nothing else to do meanwhile, as far as can be told from them.
    """
    shapes = _worth_timing(run, [Shape(size) for size in SIZES if size <= longest] or [Shape(1)])
    taken: list[list[list[float]]] = []
    started = time.perf_counter()
    while len(taken) < FEWEST or (len(taken) < REPEATS and time.perf_counter() - started < ENOUGH):
        # Sizes take turns: what disturbs the machine for a while disturbs them all.
        taken.append([run(shape) for shape in shapes])
    runs = np.array(taken)
    # A step that is slower than one of more tokens can be filled up to it, so its parts are worth what that one's are.
    *parts, plain = np.median(runs, axis=0).T
    rising = np.minimum.accumulate(np.array(parts)[:, ::-1], axis=1)[:, ::-1]
    sizes = tuple(shape.tokens for shape in shapes)
    attention = _attention(run, min(most_context, LONG_CONTEXT), runs.shape[-1])
    return PartTimes(sizes, (*map(tuple, rising.tolist()), tuple(plain.tolist())), attention), quiet(runs)


def _worth_timing(run: Run, shapes: list[Shape]) -> list[Shape]:
    """Run shapes, the smallest first, and return them up to the first that takes ``PLENTY`` times as long as one."""
    one = 0.0
    for number, shape in enumerate(shapes):
        run(shape)  # makes kernels
        seconds = sum(run(shape)) if shape.tokens > MORE or not one else 0.0
        one = one or seconds
        if seconds > PLENTY * one:
            return shapes[: number + 1]
    return shapes


def quiet(runs: np.ndarray) -> bool:
    """Say whether the machine did nothing else while a step's parts were timed.

    Undisturbed, a size's fastest run takes at least half of what that of one token less takes, and most runs of a size
    take about as long as its fastest one.

    Args:
        runs: Seconds, [repeats, sizes, parts].
    """
    whole, plain = runs[..., :-1].sum(axis=-1), runs[..., -1]
    for seconds in (whole, plain):
        fastest = seconds.min(axis=0)
        if (fastest[1:] < fastest[:-1] / 2).any():
            return False
        if np.median(np.median(seconds, axis=0) / fastest) > UNSTEADY:
            return False
    return True


def _attention(run: Run, context: int, parts: int) -> Attention:
    """Return ``PartTimes.attention``, from steps in a short and in a long context; zeros if contexts are short."""
    none = (0.0,) * parts
    if context < 2 * MEASURED_CONTEXT:
        return none, none
    shapes = [Shape(tokens, at, spread=False) for tokens in (1, MORE) for at in (MEASURED_CONTEXT, context)]
    for shape in shapes:
        run(shape)
    seconds = np.median([[run(shape) for shape in shapes] for _ in range(FEWEST)], axis=0)
    near, far, near_more, far_more = seconds / (context - MEASURED_CONTEXT)
    first = np.maximum(0.0, far - near)
    more = np.maximum(0.0, (far_more - near_more - first) / (MORE - 1))
    return tuple(first.tolist()), tuple(more.tolist())


def measured(path: Path, run: Run, longest: int, most_context: int = MEASURED_CONTEXT) -> PartTimes:
    """Return the times in ``path`` if they still hold, otherwise measure and keep them there; see ``measure``.

    They hold if a whole step of the smallest and of a middle size still takes what it took, within ``DRIFT``. Times
    that were taken while something else ran are taken again, and not kept.
    """
    try:
        times = PartTimes.of(json.loads(path.read_text()))
        if len({len(times.sizes), *map(len, times.parts)}) > 1 or {*map(len, times.attention)} != {len(times.parts)}:
            raise ValueError(f"{path} has parts of other sizes")
        holds = all(_still(times, run, at) for at in {0, len(times.sizes) // 2})
    except (OSError, ValueError, TypeError, LookupError):
        holds = False
    if holds:
        return times
    started = time.perf_counter()
    for _ in range(TRIES):
        times, undisturbed = measure(run, longest, most_context)
        if undisturbed or time.perf_counter() - started > TRIES * ENOUGH:
            break
    if not undisturbed:
        words = "self-exit: something else ran while step times were taken; they are taken again at the next start"
        logger.warning(words)
        return times
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(times)).encode())
    except OSError as error:
        logger.warning("self-exit: step times are measured at every start, %s cannot be written: %s", path, error)
    return times


def _still(times: PartTimes, run: Run, at: int) -> bool:
    shape = Shape(times.sizes[at])
    run(shape)
    now = float(np.median([sum(run(shape)) for _ in range(3)]))
    then = sum(part[at] for part in times.parts)
    return abs(now - then) < DRIFT * then


class Acceptance:
    """Calibrated acceptance per draft position, corrected by what verification says.

    Args:
        entropy: Knots of each position's map, nats, rising.
        probability: Acceptance at the knots, falling. Knots hold equally many held-out tokens each.
        deeper: The next exit's acceptance at the knots, of the same tokens; by default and where empty it is not known.
    """

    PRIOR = 30.0
    """Verified drafts that calibration is worth: so many it takes to move half way from it."""
    MEMORY = 0.995
    FORGET = 0.999

    def __init__(
        self,
        entropy: Sequence[Sequence[float]],
        probability: Sequence[Sequence[float]],
        deeper: Sequence[Sequence[float]] = (),
    ):
        self._deeper = [np.asarray(knots) for knots in deeper]
        self._entropy = [np.asarray(knots) for knots in entropy]
        self._probability = [np.asarray(knots) for knots in probability]
        self._expected = self._seen = 0.0

    @property
    def correction(self) -> float:
        """Accepted over expected, of the drafts verified lately, drawn towards 1 as long as there are few."""
        return (self._seen + self.PRIOR) / (self._expected + self.PRIOR)

    def of(self, position: int, entropy: np.ndarray) -> np.ndarray:
        """Return the acceptance probability of tokens drafted at ``entropy`` nats, 0 where that is not a number."""
        n = min(position, len(self._entropy) - 1)
        found = np.interp(entropy, self._entropy[n], self._probability[n]) * self.correction
        return np.where(np.isnan(entropy), 0.0, np.clip(found, 0.0, 1.0))

    def deeper(self, position: int, entropy: np.ndarray) -> np.ndarray | None:
        """Return the next exit's acceptance probability of tokens at ``entropy`` nats here, None if it is not known."""
        n = min(position, len(self._deeper) - 1)
        if n < 0 or not len(self._deeper[n]):
            return None
        return np.where(np.isnan(entropy), 0.0, np.interp(entropy, self._entropy[n], self._deeper[n]))

    def spread(self, position: int, leaving: float = -math.inf) -> np.ndarray:
        """Return equally likely acceptance probabilities of a token yet to be drafted at ``position``.

        Args:
            position: Its draft position.
            leaving: Nats up to which such a token leaves and is accepted in any case.
        """
        n = min(position, len(self._probability) - 1)
        corrected = np.clip(self._probability[n] * self.correction, 0.0, 1.0)
        return np.where(self.leaves(position, leaving), 1.0, corrected)

    def leaves(self, position: int, leaving: float) -> np.ndarray:
        """Return which of ``spread``'s tokens leave; arguments as there."""
        return self._entropy[min(position, len(self._entropy) - 1)] <= leaving

    def learn(self, expected: float, accepted: bool) -> None:
        """Take note of one verified draft token that was expected to be accepted with probability ``expected``."""
        self._expected = self.MEMORY * self._expected + expected / max(self.correction, 1e-6)
        self._seen = self.MEMORY * self._seen + accepted

    def forget(self) -> None:
        """Move a little back to calibration; called when nothing is drafted, so that drafting is tried again."""
        self._expected *= self.FORGET
        self._seen *= self.FORGET


class Copying:
    """How often copied tokens are accepted, by how many of the newest tokens occurred before.

    The first copied token and those behind it are told apart: where a copy goes on at all it tends to go on for long.
    """

    PRIOR = 10.0
    """Verified tokens that a first guess is worth."""
    MEMORY = 0.995
    FORGET = 0.999

    def __init__(self) -> None:
        lengths = np.arange(LONGEST + 1)
        self._guess = np.stack([1 - 0.5 ** (lengths / 2), 1 - 0.5 ** ((lengths + 1) / 2)], axis=1)
        self._accepted, self._verified = np.zeros_like(self._guess), np.zeros_like(self._guess)

    def of(self, length: int, count: int) -> np.ndarray:
        """Return for each of ``count`` copied tokens the probability that it and all before it are accepted."""
        accepted = self._accepted[length] + self.PRIOR * self._guess[length]
        first, later = accepted / (self._verified[length] + self.PRIOR)
        return first * later ** np.arange(count)

    def learn(self, length: int, verified: int, accepted: int) -> None:
        """Take note of a copy of ``verified`` tokens, at least one, of which the first ``accepted`` were accepted."""
        tested, right = min(verified, accepted + 1), min(1, accepted)
        self._accepted[length] = self.MEMORY * self._accepted[length] + [right, accepted - right]
        self._verified[length] = self.MEMORY * self._verified[length] + [1, tested - 1]

    def forget(self, length: int) -> None:
        """Move a little back to the first guess; called when nothing is copied, so that it is tried again."""
        self._accepted[length] *= self.FORGET
        self._verified[length] *= self.FORGET
