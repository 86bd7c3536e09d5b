"""Exit policies: after each draft step, which tokens to draft, and whether to go on."""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch

from vllm_earlyexit.config import MAX_DRAFT_LENGTH, EarlyExitConfig
from vllm_earlyexit.engine.cost import Acceptance, Copying, StepTimes
from vllm_earlyexit.engine.early_exit import Limits
from vllm_earlyexit.engine.gain_monitor import MARGIN, SEEN, GainMonitor, Kind, Seen, alike
from vllm_earlyexit.engine.lookup import Repeat
from vllm_earlyexit.heads.checkpoint import ExitHeadConfig

logger = logging.getLogger("vllm.earlyexit")

GRID = np.linspace(0, 1, 65)
FIRST = 6
"""Round up to which, from the second on, nothing is drafted until one has shown what vLLM does around the model."""
SLOWER = 2.0
"""A plain step that takes more than so many times what the model was measured to take is one of a slower machine, on
which drafting takes longer too."""
MOST_MISSED = 3.0
"""By how many times what a round was expected to take it may take longer for that to be believed."""
CAUTIOUS = 2
"""Longest draft until one has been compared with plain decoding."""
REPORT = 4096
"""Rounds after which the log says what rounds took and what they were expected to take."""
MOST_TABLES = 1024
TOLERANCE = 0.05
"""Change of what values depend on from which on they are tabulated anew."""


@dataclass(frozen=True)
class Copy:
    """What is copied for a sequence.

    Attributes:
        length: How many of its newest tokens occurred before.
        count: Tokens to copy.
        behind: How many tokens of the head's they stand behind.
    """

    length: int
    count: int
    behind: int = 0


@dataclass(frozen=True)
class Drafted:
    """A token that a head drafted.

    Attributes:
        cut: At which exit.
        expected: Probability that it is kept if all before it are.
        final: Whether it left, so that verification keeps it.
    """

    cut: int
    expected: float
    final: bool


@dataclass(frozen=True)
class Decision:
    """What to do after a draft step.

    Attributes:
        keep: Which of the step's tokens are drafted, bool [n]; a sequence stops at its first False.
        go_on: Whether sequences that keep theirs and have room draft another, in this step whatever exit they are from.
        deeper: Which of the others are taken on to the next exit, to ask its head, bool [n]; None for none.
    """

    keep: torch.Tensor
    go_on: bool = True
    deeper: torch.Tensor | None = None


@dataclass(frozen=True)
class Worth:
    """What asking the head is worth to a sequence.

    Attributes:
        asking: For each draft position, in tokens, at each probability in ``GRID`` that all before it is accepted.
        steps: At how many draft positions in a row it is expected to be worth something before anything is drafted.
    """

    asking: Sequence[np.ndarray]
    steps: int


Lookup = Callable[[], Sequence[Repeat]]
RowLimits = Sequence[Limits | None]


def nothing() -> Sequence[Repeat]:
    """Tell of no repeats."""
    return ()


class Policy(Protocol):
    """Decides for a batch of sequences, step by step, what to draft.

    Attributes:
        exit: From which exit this round drafts, as the drafter numbers them; unsure tokens may go on to later ones.
    """

    exit: int

    @property
    def copied(self) -> Mapping[int, int]:
        """Sequences that are not drafted for in this round but repeat themselves, and for how many tokens."""

    def start(self, num_seqs: int, context: int = 0) -> bool:
        """Start a round; return whether to ``begin`` it, instead of drafting nothing.

        Args:
            num_seqs: Sequences in it.
            context: Tokens of each, on average.
        """

    def begin(self, lookup: Lookup = nothing, limits: RowLimits = ()) -> bool:
        """Begin a round that has started; return whether to ask the head about those that are not copied.

        Args:
            lookup: Tells of each what followed when its newest tokens last occurred.
            limits: Of each, up to which entropy its tokens leave; None if they never do. By default nobody's do.
        """

    def decide(
        self, rows: torch.Tensor, entropy: torch.Tensor, cut: int, final: torch.Tensor | None = None, lift: bool = True
    ) -> Decision:
        """Decide what to do with the newest tokens of some sequences.

        Args:
            rows: The sequences, int64 [n].
            entropy: Of the head's choices, in nats, [n].
            cut: Which exit's head was asked; a later one than ``exit`` for tokens that went deeper in the same step.
            final: Which tokens leave, bool [n]: what verification says of these does not matter. None if none do.
            lift: Whether some may be taken on to the next exit.
        """

    def ahead(self, n: int) -> int:
        """Say how many draft steps of ``n`` lossless sequences to run before a look at them, if that takes time."""

    def append(self, lookup: Lookup) -> Mapping[int, int]:
        """Say for which sequences to copy how many tokens behind what the head has drafted for them, possibly nothing.

        Args:
            lookup: Tells of each sequence what followed when its newest tokens, drafted ones included, last occurred.
        """

    def learn(self, row: int, verified: int, accepted: int) -> None:
        """Take note of how many drafts of a sequence of the last round were verified, and how many of them accepted."""

    def interrupt(self) -> None:
        """Learn nothing from how long the last round took: there was a pause before the next one."""

    def note_prompts(self) -> None:
        """Take note that the last round's step had prompts in it."""


class FixedPolicy:
    """LayerSkip's rule: always draft the full length."""

    exit = 0
    copied: Mapping[int, int] = MappingProxyType({})

    def start(self, num_seqs: int, context: int = 0) -> bool:
        """Return True."""
        return True

    def begin(self, lookup: Lookup = nothing, limits: RowLimits = ()) -> bool:
        """Return True, and copy nothing."""
        return True

    def decide(
        self, rows: torch.Tensor, entropy: torch.Tensor, cut: int, final: torch.Tensor | None = None, lift: bool = True
    ) -> Decision:
        """Keep every token and go on."""
        return Decision(torch.ones_like(rows, dtype=torch.bool))

    def ahead(self, n: int) -> int:
        """Run all of them: nothing depends on what is seen."""
        return MAX_DRAFT_LENGTH

    def append(self, lookup: Lookup) -> Mapping[int, int]:
        """Copy nothing."""
        return self.copied

    def learn(self, row: int, verified: int, accepted: int) -> None:
        """Learn nothing."""

    def interrupt(self) -> None:
        """Learn nothing anyway."""

    def note_prompts(self) -> None:
        """Learn nothing anyway."""


class EntropyPolicy(FixedPolicy):
    """Stop at the first token whose entropy H = -Σ p ln p is above a calibrated threshold (DSSD).

    With several exits, such a token is first taken on to the next exit; the draft stops where the last one is unsure.

    Args:
        thresholds: Nats, one for each exit.
    """

    def __init__(self, thresholds: Sequence[float]):
        self.thresholds = thresholds

    def decide(
        self, rows: torch.Tensor, entropy: torch.Tensor, cut: int, final: torch.Tensor | None = None, lift: bool = True
    ) -> Decision:
        """Keep final tokens and those up to the threshold; an entropy that is not a number stops the draft."""
        keep = entropy <= self.thresholds[cut]
        keep = keep if final is None else keep | final
        lifted = lift and cut + 1 < len(self.thresholds)
        return Decision(keep, deeper=~keep & ~entropy.isnan() if lifted else None)

    def ahead(self, n: int) -> int:
        """Look after each step: nothing says how many are worth their time."""
        return 1


class AutoPolicy:
    """Draft as long as it is expected to raise the batch's tokens per second.

    A token that is kept is verified: that feeds it through all layers and yields, if it and all before it are
    accepted, one token more. With λ the tokens per second that the batch makes anyway, keeping m tokens is worth
    Σ P_r - λ (s(m) + d(n + m) - d(n)), where P_r is the probability that row r's draft is accepted up to and with its
    newest token and n tokens are to be verified as it is. Asking the head once more costs λ h(m), because feeding the
    kept tokens below the cut is due in any case; it is worth what having the choice is worth, by dynamic programming
    over the calibrated spread of acceptance at the draft positions to come. λ starts at plain decoding's rate and
    follows the rate that drafting reaches (Dinkelbach's method for a ratio of expectations).

    What vLLM does around the model, and what a draft step costs beside its parts, is learned from the time between
    rounds: the former in rounds without a draft, of which there is one at once and then now and then for this purpose.
    Times may still mislead, so what rounds with and without drafts really took is compared (``GainMonitor``), for heads
    and copies apart; what turns out slower than plain decoding stops, but for tries. Where copies and the head compete
    for a sequence, the head's worth is counted as the share of it that has come true so far.

    Each round drafts from the exit at which asking is worth most. A token that is not kept is taken on to the next exit
    if the calibrated acceptance there, of tokens that were so unsure here, is worth the layers between, its head, and
    verifying one more token; the layers are counted as if verification did not need them anyway.

    A token that leaves adds nothing to verify where the one before it then skips the layers above (``skips``): only the
    layers below the cut are due for it.

    Where a sequence's newest tokens occurred in it before, what followed then costs no draft step. Such a copy is taken
    instead of asking the head if it is worth more, and behind what the head has drafted; how often copies are accepted,
    by the length of what occurred before, is learned from verification. Copies leave λ alone: a token drafted elsewhere
    saves a round of the kind that is left there, not one of the fast ones. Where a step of more tokens takes less
    time, because kernels are better at their number, even unlikely copies are worth it.

    Args:
        acceptances: From entropy to acceptance, for each exit.
        longest: The longest draft.
        clock: Tells the time in seconds.
        skips: Whether tokens behind which others leave skip the layers above; otherwise they are verified as all are.
        copies: Whether sequences are looked through for what to copy.
    """

    MEMORY = 0.95

    def __init__(
        self,
        acceptances: Sequence[Acceptance],
        longest: int,
        clock: Callable[[], float] = time.perf_counter,
        *,
        skips: bool = False,
        copies: bool = True,
    ):
        self._acceptances, self._longest, self._clock, self.exit = acceptances, longest, clock, 0
        self._skips = skips
        self._kinds: tuple[Kind, ...] = ("heads", "copies") if copies else ("heads",)
        self._allowed: frozenset[Kind] = frozenset()
        self._copying = Copying()
        self._copies: dict[int, Copy] = {}
        self._fast = False
        self.times: Sequence[StepTimes] | None = None
        """For each exit, set once they are measured; until then nothing is drafted."""
        self._priced: Sequence[StepTimes] = ()
        self._context, self._pace = 0, 1.0
        self._rates: dict[int, tuple[float, float]] = {}
        self._values: dict[tuple[int, int, int, Limits | None], tuple[tuple[float, float], Worth]] = {}
        self._drafted: dict[int, list[Drafted]] = {}
        self._limits: RowLimits = ()
        self._around = 0.0
        self._rounds = self._plain_rounds = self._asked_rounds = 0
        self._overhead = self._spent = self._appended = self._began = self._rate = 0.0
        self._batch = self._tokens = self._step = self._asked = self._accepted = self._accepted_copies = 0
        self._copied_seconds = self._worth = 0.0
        self._monitor = GainMonitor()
        self._seen = Seen()
        self._prompts = False
        self._compared = 0
        self.predicted_seconds = self.measured_seconds = 0.0
        """Of all rounds that followed one another without a pause."""

    def start(self, num_seqs: int, context: int = 0) -> bool:
        """Start a round; return whether drafting is tried in it."""
        if self.times is None:
            return False
        self._close()
        self._copies, self._fast = {}, False
        self._batch, self._tokens, self._step, self._spent, self._asked = num_seqs, num_seqs, -1, 0.0, 0
        self._accepted, self._accepted_copies, self._drafted, self._appended = 0, 0, {}, 0.0
        self._copied_seconds = self._worth = 0.0
        self._rounds += 1
        self._seen, self._context = self._monitor.of(num_seqs, context), context
        self._priced = [times.at_context(context) for times in self.times]
        self._allowed = self._seen.start(self._kinds)
        if self._plain_rounds == 0 and 1 < self._rounds <= FIRST:
            self._allowed = frozenset()
        return bool(self._allowed)

    def begin(self, lookup: Lookup = nothing, limits: RowLimits = ()) -> bool:
        """Begin a round; return whether asking the head once is expected to pay."""
        num_seqs = self._batch
        self._limits, self._reached, self._rate = limits or [None] * num_seqs, np.ones(num_seqs), self._reachable()
        rows = np.arange(num_seqs)
        worth = self._choose_exit(rows)
        if "copies" in self._allowed:
            drafting = max(0.0, worth / num_seqs) * self._seen.of["heads"].realized()
            self._copies = self._worth_copying(lookup(), self._reached, drafting=drafting)
        self._fast = bool(self._copies)
        if self._fast:
            self._copied_seconds = self._copy(self._copies)
            self._spent += self._copied_seconds
            worth = self._choose_exit(rows[[row not in self._copies for row in rows.tolist()]])
        self._worth, asked = worth, worth > 0
        if not asked:
            self._overhead *= Acceptance.FORGET
        for number, acceptance in enumerate(self._acceptances):
            if not asked or number != self.exit:
                acceptance.forget()
        return asked

    @property
    def copied(self) -> Mapping[int, int]:
        """See ``Policy``."""
        return {row: copy.count for row, copy in self._copies.items()}

    def _choose_exit(self, rows: np.ndarray) -> float:
        """Choose where to ask the head about these sequences; return what that is worth, in tokens."""
        if len(rows) == 0 or "heads" not in self._allowed:
            return 0.0
        worth = [self._worth_of(number, rows) for number in range(len(self._priced))]
        self.exit = int(np.argmax(worth))
        return worth[self.exit]

    def _worth_copying(
        self, repeats: Sequence[Repeat], reached: np.ndarray, drafting: float = -math.inf, spare: float = 0.0
    ) -> "dict[int, Copy]":
        """Return the rows to copy for: all together raise the rate, and each is worth more than drafting for it is.

        Args:
            repeats: Of each row, or none.
            reached: Probability that all that is drafted of a row so far is accepted, [num_seqs].
            drafting: Tokens that drafting is worth to each row, if it is not over.
            spare: Seconds that more tokens may save, because the step is slow at the number that there is.
        """
        offers = [(row, repeat) for row, repeat in enumerate(repeats) if repeat.tokens]
        if not offers:
            return {}
        rows = np.concatenate([np.full(len(repeat.tokens), row) for row, repeat in offers])
        chance = np.concatenate(
            [reached[row] * self._copying.of(repeat.length, len(repeat.tokens)) for row, repeat in offers]
        )
        added = np.arange(1, len(chance) + 1)
        taken = self._together(chance, self._copied_added(added) + self._times.spare(self._tokens + added) - spare)
        cost = self._rate * float(self._copied_added(len(taken))) / max(1, len(taken))
        found: dict[int, Copy] = {}
        for row, repeat in offers:
            own = chance[taken][rows[taken] == row]
            if len(own) and own.sum() - cost * len(own) > drafting:
                found[row] = Copy(repeat.length, len(own), len(self._drafted.get(row, [])))
            else:
                self._copying.forget(repeat.length)
        return found

    def _copy(self, copies: "Mapping[int, Copy]") -> float:
        """Take note that these tokens are verified too; return the seconds that this adds."""
        added = sum(copy.count for copy in copies.values())
        seconds = float(self._copied_added(added))
        self._tokens += added
        return seconds

    def append(self, lookup: Lookup) -> Mapping[int, int]:
        """Copy as much as raises the rate."""
        if not self._asked or "copies" not in self._allowed:
            return {}
        without = [Repeat() if row in self._copies else repeat for row, repeat in enumerate(lookup())]
        found = self._worth_copying(without, self._reached, spare=float(self._times.spare(self._tokens)))
        self._appended = self._copy(found)
        self._copied_seconds += self._appended
        self._copies |= found
        return {row: copy.count for row, copy in found.items()}

    def decide(
        self, rows: torch.Tensor, entropy: torch.Tensor, cut: int, final: torch.Tensor | None = None, lift: bool = True
    ) -> Decision:
        """Keep the rows whose drafts raise the rate together; go on if asking again is expected to."""
        at, unsure = rows.cpu().numpy(), entropy.cpu().numpy()
        if cut == self.exit:
            self._step += 1
            self._kept, self._kept_rows = np.empty(0), np.empty(0, dtype=int)
        before = self._reached[at]
        leaves = np.zeros(len(at), dtype=bool) if final is None else final.cpu().numpy()
        probability = np.where(leaves, 1.0, self._acceptances[cut].of(self._step, unsure))
        reached = before * probability
        self._asked += 1
        self._spent += self._head(len(at), cut)
        later = np.maximum(self._asking(at, reached, self._step + 1), 0)
        skipping = leaves & self._skips
        kept = self._worth_keeping(reached + later, skipping)
        self._reached[at[kept]] = reached[kept]
        for row, expected, leaf in zip(at[kept].tolist(), probability[kept].tolist(), leaves[kept], strict=True):
            self._drafted.setdefault(row, []).append(Drafted(cut, expected, bool(leaf)))
        verified, skipped = int((kept & ~skipping).sum()), int((kept & skipping).sum())
        self._spent += float(self._added(verified)) + float(self._times.at("shallow", skipped))
        self._tokens += verified
        self._kept = np.concatenate([self._kept, reached[kept]])
        self._kept_rows = np.concatenate([self._kept_rows, at[kept]])
        go_on = len(self._kept) > 0 and bool(self._asking(self._kept_rows, self._kept, self._step + 1).sum() > 0)
        deeper = ~kept & self._go_deeper(before * ~kept, unsure, cut) if lift else np.zeros_like(kept)
        return Decision(
            torch.from_numpy(kept).to(rows.device),
            go_on,
            torch.from_numpy(deeper).to(rows.device) if deeper.any() else None,
        )

    def _worth_keeping(self, gain: np.ndarray, skipping: np.ndarray) -> np.ndarray:
        """Return which tokens to keep, bool [n]: those that raise the rate most together, of either kind.

        Args:
            gain: Tokens that each is worth, [n].
            skipping: Which of them spare their sequence a token to verify, instead of adding one, bool [n].
        """
        kept = np.zeros(len(gain), dtype=bool)
        for kind, cost in ((skipping, functools.partial(self._times.at, "shallow")), (~skipping, self._added)):
            rows = np.flatnonzero(kind)
            if len(rows):
                kept[rows[self._together(gain[rows], cost(np.arange(1, len(rows) + 1)))]] = True
        return kept

    def ahead(self, n: int) -> int:
        """Run as many as are each expected to pay, by what calibration says of the ones before, and at least one."""
        return max(1, self._value(n, None).steps - self._step - 1)

    def _go_deeper(self, reached: np.ndarray, entropy: np.ndarray, cut: int) -> np.ndarray:
        """Return which rows are worth taking on to the next exit, bool [n].

        Args:
            reached: Probability that all that is drafted so far is accepted, [n].
            entropy: Of the head at ``cut``, in nats, [n].
            cut: The exit that was asked.
        """
        n = len(reached)
        chosen = np.zeros(n, dtype=bool)
        if cut + 1 == len(self._acceptances) or not reached.any():
            return chosen
        expected = self._acceptances[cut].deeper(self._step, entropy)
        if expected is None:
            return chosen
        gain = reached * np.clip(expected * self._acceptances[cut + 1].correction, 0.0, 1.0)
        rows = np.arange(1, n + 1)
        seconds = self._between(cut, rows * (self._step + 1)) + self._added(rows)
        seconds += [self._head(int(m), cut + 1) for m in rows]
        taken = self._together(gain, seconds)
        chosen[taken] = True
        self._spent += float(self._between(cut, len(taken) * (self._step + 1)))
        return chosen

    def learn(self, row: int, verified: int, accepted: int) -> None:
        """Compare what was expected of a sequence's drafts with what verification said."""
        self._accepted += accepted
        copy = self._copies.get(row)
        if copy is not None:
            self._accepted_copies += max(0, accepted - copy.behind)
        if copy is not None and copy.behind <= min(accepted, verified - 1):
            self._copying.learn(copy.length, verified - copy.behind, accepted - copy.behind)
        for n, token in enumerate(self._drafted.get(row, [])[:verified]):
            if n > accepted:
                return
            if not token.final:
                self._acceptances[token.cut].learn(token.expected, n < accepted)

    def interrupt(self) -> None:
        """See ``Policy``."""
        self._began = 0.0

    def note_prompts(self) -> None:
        """See ``Policy``."""
        self._prompts = True

    @property
    def _drafts(self) -> bool:
        """Whether this round has asked the head or copied."""
        return self._asked > 0 or bool(self._copies)

    @property
    def _acceptance(self) -> Acceptance:
        return self._acceptances[self.exit]

    @property
    def _times(self) -> StepTimes:
        return self._priced[self.exit]

    def _worth_of(self, number: int, rows: np.ndarray) -> float:
        """Return what asking an exit's head about these sequences is worth at the start of a round, in tokens."""
        self.exit = number
        return float(self._asking(rows, np.ones(len(rows)), 0).sum())

    def _reachable(self) -> float:
        """Return the batch's tokens per second, at the measured pace: at least a little more than plain decoding's."""
        seen, step = self._seen.plain, float(self._times.at("plain", self._batch))
        plain = self._batch / (seen.value * step / self._pace if seen.count >= SEEN else step + self._around)
        tokens, time = self._rates.get(alike(self._batch), (0.0, 0.0))
        return max((1 + MARGIN) * plain, tokens / time * self._batch / step if time else 0.0)

    def _head(self, n: int, cut: int) -> float:
        """Return the seconds that asking an exit's head for n rows adds to a round."""
        return float(self._priced[cut].at("head", n)) + self._overhead

    def _between(self, cut: int, n: np.ndarray | int) -> np.ndarray:
        """Return the seconds that n tokens take from an exit to the next one."""
        below, further = (self._priced[at].at("shallow", n) for at in (cut, cut + 1))
        return np.maximum(0.0, further - below)

    def _added(self, m: np.ndarray | int) -> np.ndarray:
        """Return the seconds that verifying m more tokens adds, for each m."""
        return self._times.at("shallow", m) + self._more("deep", m)

    def _copied_added(self, m: np.ndarray | int) -> np.ndarray:
        """Return the seconds that verifying m copied tokens adds, for each m: in one pass with the others."""
        return self._more("shallow", m) + self._more("deep", m)

    def _more(self, part: str, m: np.ndarray | int) -> np.ndarray:
        """Return the seconds that a part takes longer for m tokens beside those that are to be verified anyway."""
        return self._times.at(part, self._tokens + m) - self._times.at(part, self._tokens)

    def _together(self, gain: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Return indices of the gains, the largest first, that raise the rate most together; possibly none.

        Args:
            gain: Tokens, [n].
            seconds: What 1 to n of them cost, [n].
        """
        order = np.argsort(-gain, kind="stable")
        values = gain[order].cumsum() - self._rate * seconds
        best = int(values.argmax())
        return order[: best + 1] if values[best] > 0 else order[:0]

    def _asking(self, rows: np.ndarray, reached: np.ndarray, step: int) -> np.ndarray:
        """Return for each row what asking the head at draft position ``step`` is worth, in tokens; [n].

        Costs that rows share are split among the n of them.
        """
        n = len(reached)
        if step >= (self._longest if self._seen.of["heads"].instead.count else min(CAUTIOUS, self._longest)):
            return np.full(n, -1.0)
        kinds = [self._limits[row] for row in rows.tolist()]
        worth = np.empty(n)
        for kind in set(kinds):
            own = [other == kind for other in kinds]
            worth[own] = np.interp(reached[own], GRID, self._value(n, kind).asking[step])
        return worth

    def _value(self, n: int, limits: Limits | None) -> Worth:
        """Return what ``_tabulate`` does, tabulated anew only if what it depends on has changed."""
        now = (self._rate * self._acceptance.correction, 1 + self._rate * self._head(n, self.exit))
        key = (self.exit, n, self._times.context, limits)
        known = self._values.get(key)
        if known is None or max(abs(then / value - 1) for then, value in zip(known[0], now, strict=True)) > TOLERANCE:
            if len(self._values) > MOST_TABLES:
                self._values.clear()
            known = self._values[key] = (now, self._tabulate(n, limits))
        return known[1]

    def _tabulate(self, n: int, limits: Limits | None) -> Worth:
        """Return what asking is worth to one of n rows."""
        each, fed = self._rate * float(self._added(n)) / n, self._rate * float(self._times.at("shallow", n)) / n
        head = self._rate * self._head(n, self.exit) / n
        tables: list[np.ndarray] = []
        later = np.zeros_like(GRID)
        for step in reversed(range(self._longest)):
            leaving = -math.inf if limits is None else limits.at(self.exit, step)
            reached = GRID[:, None] * self._acceptance.spread(step, leaving)[None, :]
            skips = self._acceptance.leaves(step, leaving) & self._skips
            kept = reached - np.where(skips, fed, each) + np.interp(reached, GRID, later)
            tables.append(np.maximum(kept, 0).mean(axis=1) - head)
            later = np.maximum(tables[-1], 0)
        return Worth(tables[::-1], self._steps(tables[::-1]))

    def _steps(self, asking: Sequence[np.ndarray]) -> int:
        """Return how many draft steps in a row are worth asking, each by what is likely to be reached before it."""
        likely: np.ndarray = np.zeros_like(GRID)
        likely[-1] = 1.0
        for step, worth in enumerate(asking):
            if likely @ worth <= 0:
                return step
            spread = self._acceptance.spread(step)
            reached = np.rint(GRID[:, None] * spread[None, :] * (len(GRID) - 1)).astype(int)
            weights = np.repeat(likely / len(spread), len(spread))
            likely = np.bincount(reached.ravel(), weights, minlength=len(GRID))
        return len(asking)

    def _close(self) -> None:
        """Remember the expected tokens and seconds of the round that ends, and what it took beside the model."""
        now, began = self._clock(), self._began
        self._began = now
        if not self._batch:
            return
        expected = self._batch + sum(
            float(np.cumprod([token.expected for token in drafted]).sum()) for drafted in self._drafted.values()
        )
        step, kind = float(self._times.at("plain", self._batch)), alike(self._batch)
        predicted = step + self._around + self._spent
        if self._drafts:
            predicted -= float(self._times.spare(self._batch))
        if not self._fast:
            tokens, time = self._rates.get(kind, (0.0, 0.0))
            self._rates[kind] = (self.MEMORY * tokens + expected / self._batch, self.MEMORY * time + predicted / step)
        if self._drafts:
            predicted += self._appended + float(self._times.spare(self._tokens))
        compared = self._monitor.note_prompts(self._prompts) and began > 0
        beside_prompts, self._prompts = self._prompts, False
        if not compared:
            return
        took = now - began
        self._tell_monitor(took / step, step)
        self._learn_pace()
        if beside_prompts:
            return
        self.predicted_seconds += predicted
        self.measured_seconds += took
        self._compared += 1
        if self._compared % REPORT == 0:
            words = "self-exit: %d rounds took %.1f s, %.1f s were expected"
            logger.info(words, self._compared, self.measured_seconds, self.predicted_seconds)
        missed = min(took / self._pace - predicted, MOST_MISSED * predicted)  # one round that was disturbed says little
        if not self._drafts:
            self._around = max(0.0, self._around + self._share(self._plain_rounds) * missed)
            self._plain_rounds += 1
        elif self._asked and self._plain_rounds:
            self._asked_rounds += 1
            self._overhead = max(0.0, self._overhead + self._share(3 + self._asked_rounds) * missed / self._asked)

    def _learn_pace(self) -> None:
        """Learn from plain rounds how many times slower than measured the machine is, beyond what is around a step."""
        if self._seen.plain.count < SEEN:
            return
        before, self._pace = self._pace, max(1.0, self._seen.plain.value / SLOWER)
        if self._pace > SLOWER * before:  # what was missed so far was the machine's pace, not a draft step's overhead
            self._overhead, self._asked_rounds = 0.0, 0

    def _tell_monitor(self, took: float, step: float) -> None:
        """Let the monitor take note of the round that ends.

        Args:
            took: What it took, in plain steps.
            step: What one of these was measured to take, in seconds.
        """
        seen = self._monitor.of(self._batch, self._context)
        if self._asked:
            own = 1 + (self._accepted - self._accepted_copies) / self._batch
            seen.add("heads", own, took - self._pace * self._copied_seconds / step, self._worth / self._batch)
        elif self._copies:
            seen.add("copies", 1 + self._accepted / self._batch, took)
        else:
            seen.add_plain(took)

    def _share(self, known: int) -> float:
        """Return by how much of what it missed a time is corrected that so many rounds have told of."""
        return max(1 / (1 + known), 1 - self.MEMORY)


def build_policy(config: EarlyExitConfig, heads: Sequence[ExitHeadConfig]) -> Policy:
    """Return the policy that ``config`` names, for exits with these heads."""
    if config.policy == "entropy":
        return EntropyPolicy(config.entropy_thresholds)
    if config.policy == "auto":
        maps = [head.calibration.positions for head in heads if head.calibration is not None]
        acceptances = [
            Acceptance([p.entropy for p in at], [p.probability for p in at], [p.deeper for p in at]) for at in maps
        ]
        skips = config.fill_in == "propagate"
        return AutoPolicy(acceptances, config.num_speculative_tokens, skips=skips, copies=config.prompt_lookup)
    return FixedPolicy()
