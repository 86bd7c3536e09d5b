"""What the parts of a step cost on the machine that serves, and what drafting is worth at these costs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of tokens at which the parts of a step are timed."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds that the parts of a step take for n tokens, measured at start-up.

    Attributes:
        sizes: Numbers of tokens n, rising.
        shallow: The layers below the cut.
        head: What drafting adds to feeding n tokens below the cut: exit head, choice, entropy, bookkeeping.
        deep: The layers above the cut, and lm_head for every token.
        plain: One plain decoding step of n sequences without vLLM's own work around the model.
    """

    sizes: tuple[int, ...]
    shallow: tuple[float, ...]
    head: tuple[float, ...]
    deep: tuple[float, ...]
    plain: tuple[float, ...]

    def at(self, part: str, n: float) -> float:
        """Return a part's seconds for n tokens: linear between the measured sizes and beyond the last; 0 for none."""
        if n <= 0:
            return 0.0
        times = getattr(self, part)
        if n <= self.sizes[-1] or len(self.sizes) == 1:
            return float(np.interp(n, self.sizes, times))
        slope = (times[-1] - times[-2]) / (self.sizes[-1] - self.sizes[-2])
        return float(times[-1] + max(0.0, slope) * (n - self.sizes[-1]))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready copy."""
        return asdict(self)


def measure(run: Callable[[int], dict[str, float]], longest: int, repeats: int = 5) -> StepTimes:
    """Time every part at every size up to ``longest`` tokens.

    Args:
        run: Runs a drafting and a plain step over n tokens, parts in their order, and returns the seconds of each part.
            Run over and over by itself, a part would find its weights in a cache that others empty in between.
        longest: The largest size that can be run.
        repeats: Runs of each size; the median counts.
    """
    sizes = [size for size in SIZES if size <= longest] or [1]
    times: dict[str, list[float]] = {part: [] for part in ("shallow", "head", "deep", "plain")}
    for size in sizes:
        run(size)
        runs = [run(size) for _ in range(repeats)]
        for part, measured in times.items():
            measured.append(float(np.median([seconds[part] for seconds in runs])))
    for part, measured in times.items():
        times[part] = np.maximum.accumulate(measured).tolist()  # more tokens never cost less
    return StepTimes(tuple(sizes), *map(tuple, times.values()))


class Acceptance:
    """Calibrated acceptance per draft position, corrected by what verification says.

    Args:
        entropy: Knots of each position's map, nats, rising.
        probability: Acceptance at the knots, falling. Knots hold equally many held-out tokens each.
    """

    PRIOR = 30.0
    """Verified drafts that calibration is worth: so many it takes to move half way from it."""
    MEMORY = 0.995
    FORGET = 0.999

    def __init__(self, entropy: Sequence[Sequence[float]], probability: Sequence[Sequence[float]]):
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

    def spread(self, position: int) -> np.ndarray:
        """Return equally likely acceptance probabilities of a token yet to be drafted at ``position``."""
        n = min(position, len(self._probability) - 1)
        return np.clip(self._probability[n] * self.correction, 0.0, 1.0)

    def learn(self, expected: float, accepted: bool) -> None:
        """Take note of one verified draft token that was expected to be accepted with probability ``expected``."""
        self._expected = self.MEMORY * self._expected + expected / max(self.correction, 1e-6)
        self._seen = self.MEMORY * self._seen + accepted

    def forget(self) -> None:
        """Move a little back to calibration; called when nothing is drafted, so that drafting is tried again."""
        self._expected *= self.FORGET
        self._seen *= self.FORGET
