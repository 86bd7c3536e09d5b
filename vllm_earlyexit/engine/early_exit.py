"""Early-exit decoding: what requests may ask for, which tokens leave, and whether they keep what was promised.

A token *leaves* at a cut if the head there is sure enough of it. It is then sampled from the head and final: the full
model does not get to reject it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_earlyexit.config import EarlyExitConfig
from vllm_earlyexit.engine.counters import (
    AGREED_TOKENS,
    CHECKED_TOKENS,
    EARLY_TOKENS,
    FULL_DEPTH_TOKENS,
    INVOLUNTARY_TOKENS,
    PROMISED_TOKENS,
    Counters,
)
from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import PositionCalibration

MODE, ACCURACY, THRESHOLD = "self_exit_mode", "early_exit_accuracy", "early_exit_threshold"
PREFIXES = ("self_exit", "early_exit")
NEVER = -math.inf
FAR_OFF = 1.5
"""Errors over calibrated errors from which on all are checked."""
DOUBT = 0.01
"""See ``PositionCalibration.threshold``; without any, no correction changes limits where calibration saw no error."""
TRUST = 200
"""Early tokens that are all checked before the operator's rate counts."""
MOST_LIMITS = 256
"""Kept in memory; requests may ask for any number of thresholds."""


@dataclass(frozen=True)
class Wish:
    """What a request asks for.

    Attributes:
        drafts: Whether anything is drafted for it.
        accuracy: Rate at which tokens that leave shall agree with the full model; None if that is not how it asks.
        threshold: Nats up to which tokens leave; None likewise. Without both, decoding is lossless.
    """

    drafts: bool = True
    accuracy: float | None = None
    threshold: float | None = None

    @property
    def early(self) -> bool:
        """Whether tokens may leave early."""
        return self.accuracy is not None or self.threshold is not None


OFF, LOSSLESS = Wish(drafts=False), Wish()


def wish_of(asked: Mapping[str, Any] | None, config: EarlyExitConfig) -> Wish:
    """Return what a request asks for, or the server's default.

    Args:
        asked: ``extra_args`` of its sampling parameters, ``vllm_xargs`` in vLLM's HTTP interface.
        config: The server's setting.

    Raises:
        EarlyExitError: it asks for something that there is not, or that the server does not allow.
    """
    ours = {key: value for key, value in (asked or {}).items() if key.startswith(PREFIXES)}
    if not ours:
        return Wish(accuracy=config.early_exit_accuracy)
    if unknown := set(ours) - {MODE, ACCURACY, THRESHOLD}:
        raise EarlyExitError(f"self-exit: there is no {min(unknown)!r}; there are {MODE}, {ACCURACY} and {THRESHOLD}")
    mode = ours.pop(MODE, "early_exit")
    if mode not in ("off", "lossless", "early_exit"):
        raise EarlyExitError(f"self-exit: {MODE}={mode!r} is none of off, lossless and early_exit")
    if mode != "early_exit":
        if ours:
            raise EarlyExitError(f"self-exit: {min(ours)} needs {MODE}=early_exit, not {mode}; drop one of them")
        return OFF if mode == "off" else LOSSLESS
    if config.lowest_accuracy is None:
        raise EarlyExitError("self-exit: this server decodes losslessly; early exits need its knob lowest_accuracy")
    if len(ours) == 2:
        raise EarlyExitError(f"self-exit: {ACCURACY} and {THRESHOLD} exclude each other; drop one of them")
    if not ours:
        return Wish(accuracy=config.early_exit_accuracy or config.lowest_accuracy)
    (key, value), *_ = ours.items()
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise EarlyExitError(f"self-exit: {key}={value!r} is not a number")
    if key == THRESHOLD:
        return Wish(threshold=float(value))
    if not config.lowest_accuracy <= value < 1:
        raise EarlyExitError(f"self-exit: {key} must be at least {config.lowest_accuracy:g} here, and below 1")
    return Wish(accuracy=float(value))


@dataclass(frozen=True)
class Limits:
    """Nats up to which a sequence's tokens leave.

    Attributes:
        entropy: For each exit and draft position; the last position's counts for those behind it.
        accuracy: Rate at which these tokens shall agree with the full model; None if nobody asked for one.
    """

    entropy: tuple[tuple[float, ...], ...]
    accuracy: float | None = None

    def at(self, cut: int, position: int) -> float:
        """Return the limit of an exit at a draft position."""
        positions = self.entropy[cut]
        return positions[min(position, len(positions) - 1)]


class Promise:
    """Whether tokens that left agree with the full model as often as was promised.

    Calibrated error rates are multiplied by a correction, whose logarithm rises with every error and falls a little
    with every token that agreed, so that it comes to rest where errors are as frequent as promised, however wrong
    calibration is (adaptive conformal inference, Gibbs and Candes 2021). It is never below 1. The first errors move it
    most, as much less as there were more (decaying step sizes, Angelopoulos et al. 2024, arXiv:2402.01139).
    """

    FIRST_RATE, RATE = 0.5, 0.1
    """By which the first error and late ones move the logarithm."""
    IDLE, MEMORY = 1000, 0.999
    """Times in a row that a request got tokens of which none had left, and what then remains of the logarithm."""
    STEP = 1.1
    """The correction is rounded to a power of this, so that thresholds change seldom."""

    def __init__(self) -> None:
        self._logarithm, self._idle, self._errors = 0.0, 0, 0

    @property
    def correction(self) -> float:
        """Errors over calibrated errors, as far as is known."""
        return self.STEP ** round(self._logarithm / math.log(self.STEP))

    def learn(self, accuracy: float, agreed: bool) -> None:
        """Take note of a token that left and was promised to agree at this rate."""
        rate = max(self.RATE, self.FIRST_RATE / math.sqrt(1 + self._errors))
        self._logarithm = max(0.0, self._logarithm + rate * (accuracy - agreed))
        self._errors += not agreed

    def emitted(self, left: bool) -> None:
        """Take note of whether of the tokens that a request has got some had left; if none do, it is tried again."""
        self._idle = 0 if left else self._idle + 1
        if self._idle > self.IDLE:
            self._logarithm *= self.MEMORY


@dataclass(frozen=True)
class Left:
    """A token that left.

    Attributes:
        cut: At which exit.
        accuracy: Of ``Limits``.
        sure: Whether the head was as sure of it as its request asks for.
    """

    cut: int
    accuracy: float | None
    sure: bool = True


class EarlyExits:
    """Early exits of one engine.

    Args:
        config: The resolved setting.
        positions: Of each exit the calibration at each draft position.
    """

    def __init__(self, config: EarlyExitConfig, positions: Sequence[Sequence[PositionCalibration]]):
        self._config, self._positions = config, positions
        self._counters = Counters(config.counters)
        self._known: dict[tuple[Wish, float], Limits] = {}
        self._due = 0.0
        self.promise = Promise()
        self.counts: defaultdict[str, float] = defaultdict(float)
        """As on the metrics page; tokens that left also by layer."""

    def limits(self, wish: Wish) -> Limits | None:
        """Return up to which entropy the tokens of a request leave; None if they never do."""
        if not wish.early:
            return None
        key = (wish, self.promise.correction)
        if key not in self._known:
            if len(self._known) > MOST_LIMITS:
                self._known.clear()
            self._known[key] = self._limits(*key)
        return self._known[key]

    def _limits(self, wish: Wish, correction: float) -> Limits:
        lowest = self._config.lowest_accuracy if wish.accuracy is None else wish.accuracy
        assert lowest is not None
        agreement = 1 - (1 - lowest) / correction
        most = math.inf if wish.threshold is None else wish.threshold
        limits = tuple(tuple(min(most, at.threshold(agreement, DOUBT)) for at in exit_) for exit_ in self._positions)
        return Limits(limits, wish.accuracy)

    def checks(self) -> bool:
        """Say whether to check the tokens of a sequence that are about to be filled in.

        At the operator's rate; all of them at first, and while they are seen to agree far less often than calibration
        says. None at a rate of 0.
        """
        rate, doubted = self._config.check_rate, self.promise.correction >= FAR_OFF
        self._due += 1 if rate and (doubted or self.counts[CHECKED_TOKENS] < TRUST) else rate
        if self._due < 1:
            return False
        self._due -= 1
        return True

    def checked(self, token: Left, agreed: bool) -> None:
        """Take note of whether the full model agrees with a token that left."""
        if token.accuracy is not None:
            self.promise.learn(token.accuracy, agreed)
            self._count(PROMISED_TOKENS, token.accuracy)
        self._count(CHECKED_TOKENS, 1)
        self._count(AGREED_TOKENS, int(agreed))

    def emitted(self, left: Sequence[Left], others: int) -> None:
        """Take note of what a request that may exit early has got: tokens that left, and how many others."""
        for cut, count in Counter(token.cut for token in left).items():
            layer = self._config.exit_layers[cut]
            self._count(EARLY_TOKENS, count, exit_layer=str(layer))
            self.counts[f"{EARLY_TOKENS}_{layer}"] += count
        self._count(INVOLUNTARY_TOKENS, sum(not token.sure for token in left))
        self._count(FULL_DEPTH_TOKENS, others)
        self.promise.emitted(bool(left))

    def _count(self, name: str, count: float, **labels: str) -> None:
        self.counts[name] += count
        self._counters.add(name, count, **labels)
