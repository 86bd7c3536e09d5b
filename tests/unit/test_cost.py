"""The auto policy: its decisions in known cases, and its speed in simulated decoding."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_earlyexit.engine.cost import (
    LONG_CONTEXT,
    MEASURED_CONTEXT,
    TRIES,
    Acceptance,
    PartTimes,
    Shape,
    StepTimes,
    measure,
    measured,
)
from vllm_earlyexit.engine.early_exit import Limits
from vllm_earlyexit.engine.gain_monitor import WARM_UP
from vllm_earlyexit.engine.lookup import SHORTEST, Repeat
from vllm_earlyexit.engine.policy import AutoPolicy, FixedPolicy, Lookup, Policy, nothing

ENTROPY = np.linspace(0, 4, 32)
LONGEST = 6
CPU = StepTimes((1, 8), (5e-3, 5.5e-3), (2e-3, 2.5e-3), (15e-3, 17e-3), (20e-3, 22e-3))
"""Decoding bound by memory: more tokens cost hardly more."""
FREE = StepTimes((1, 8), (1e-3, 1e-3), (0.0, 0.0), (99e-3, 99e-3), (100e-3, 100e-3))
PROMPT = 0.1
BOUND = StepTimes((1, 8), (5e-3, 40e-3), (2e-3, 16e-3), (15e-3, 120e-3), (20e-3, 160e-3))
"""Decoding bound by arithmetic: each token costs its share."""


def acceptance(sharpness: float = 0.7) -> Acceptance:
    return Acceptance([ENTROPY.tolist()] * 4, [np.exp(-sharpness * ENTROPY).tolist()] * 4)


def auto(times: StepTimes, **arguments: float) -> AutoPolicy:
    policy = AutoPolicy([acceptance(**arguments)], LONGEST)
    policy._plain_rounds = 20  # what vLLM does around the model is known
    policy.times = [times]
    return policy


def begins(policy: Policy, num_seqs: int, lookup: Lookup = nothing, limits: Sequence[Limits | None] = ()) -> bool:
    """Start a round; return whether the head is asked in it."""
    return policy.start(num_seqs) and policy.begin(lookup, limits)


def test_it_drafts_when_that_is_free_and_not_when_it_cannot_pay():
    assert begins(auto(FREE), 1)
    assert not begins(auto(BOUND), 1)
    assert not begins(AutoPolicy([acceptance()], LONGEST), 1), "nothing is measured yet"


def test_it_keeps_the_sure_rows_of_a_batch():
    policy = auto(replace(CPU, head=(2e-4, 3e-4)), sharpness=1.0)
    assert begins(policy, 3)
    decision = policy.decide(torch.arange(3), torch.tensor([0.05, 3.9, 0.1]), 0)
    assert decision.keep.tolist() == [True, False, True]
    assert decision.go_on
    assert not policy.decide(torch.tensor([0, 2]), torch.tensor([3.9, 3.9]), 0).keep.any()


def test_it_stops_at_the_longest_draft_and_at_logits_that_are_not_numbers():
    policy, other = auto(FREE), auto(FREE)
    policy._monitor.of(1, 0).of["heads"].instead.add(1.0, 0)
    assert begins(policy, 1)
    decisions = [policy.decide(torch.tensor([0]), torch.tensor([0.0]), 0) for _ in range(LONGEST)]
    assert [decision.go_on for decision in decisions] == [True] * (LONGEST - 1) + [False]
    assert begins(other, 1)
    assert other.decide(torch.tensor([0]), torch.tensor([torch.nan]), 0).keep.tolist() == [False]


@pytest.mark.parametrize("batch", [1, 4])
def test_early_tokens_pay_where_arithmetic_is_the_limit_if_they_spare_the_layers_above(batch: int):
    limits, rows = [Limits(((1.0,),))] * batch, torch.arange(batch)
    verified, sparing = (AutoPolicy([acceptance()], LONGEST, skips=skips) for skips in (False, True))
    verified.times = sparing.times = [BOUND]
    assert not begins(verified, batch, limits=limits)
    assert not begins(sparing, batch)
    sparing._seen.rounds = WARM_UP
    assert begins(sparing, batch, limits=limits)
    unsure = torch.full((batch,), 0.9)
    assert sparing.decide(rows, unsure, 0, final=rows >= 0).keep.all()
    assert begins(sparing, batch, limits=limits)
    assert not sparing.decide(rows, unsure, 0, final=rows < 0).keep.any(), "these would have to be verified"


def test_a_batch_too_large_to_profit_is_not_drafted_for():
    shallow, head = (5e-3, 6e-3, 8e-3, 30e-3), (2e-3, 3e-3, 4e-3, 15e-3)
    deep, plain = (15e-3, 16e-3, 24e-3, 90e-3), (20e-3, 22e-3, 32e-3, 120e-3)
    times = StepTimes((1, 8, 16, 64), shallow, head, deep, plain)
    assert [begins(auto(times), n) for n in (1, 4, 32, 64)] == [True, True, False, False]


def test_verification_corrects_calibration_and_the_correction_fades():
    policy = auto(CPU, sharpness=0.3)
    policy._clock = lambda: 0.0  # nothing is learned from time
    asked = []
    for _ in range(2000):
        asked.append(begins(policy, 1))
        if asked[-1] and policy.decide(torch.tensor([0]), torch.tensor([0.05]), 0).keep.item():
            policy.learn(0, 1, 0)
    assert sum(asked[:10]) > 5
    assert 0 < sum(asked[1000:]) < 100, "rejected drafts turn drafting off, but for a try now and then"


def test_only_drafts_that_verification_reached_are_learned_from():
    policy = auto(FREE)
    begins(policy, 1)
    for _ in range(3):
        policy.decide(torch.tensor([0]), torch.tensor([1.0]), 0)
    before = policy._acceptance.correction
    policy.learn(0, 3, 0)
    assert policy._acceptance._expected == pytest.approx(np.exp(-0.7), abs=0.02), "one of three was tested"
    assert policy._acceptance.correction < before


def test_the_log_compares_what_rounds_took_with_what_was_expected(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("vllm_earlyexit.engine.policy.REPORT", 5)
    caplog.set_level("INFO", logger="vllm.earlyexit")
    ticks = iter(range(1, 8))
    policy = AutoPolicy([acceptance()], LONGEST, clock=lambda: next(ticks) * 0.2)
    policy.times = [replace(BOUND, plain=(0.2, 1.6))]
    for _ in range(7):
        begins(policy, 1)
    assert [record.getMessage() for record in caplog.records] == ["self-exit: 5 rounds took 1.0 s, 1.0 s were expected"]


@pytest.mark.parametrize("told", ["interrupt", "note_prompts"])
def test_what_a_prompt_or_a_pause_took_is_not_learned(told: str):
    now = 0.0
    policy = AutoPolicy([acceptance()], LONGEST, clock=lambda: now)
    policy.times = [replace(BOUND, plain=(0.02, 0.16))]
    for number in range(400):
        now += 0.035 if number % 2 else 0.021
        if number % 2:
            getattr(policy, told)()
        begins(policy, 1)
    assert policy._around == pytest.approx(0.001)


def test_a_head_that_once_took_long_is_asked_again():
    policy = auto(CPU, sharpness=0.3)
    policy._clock = lambda: 0.0
    assert begins(policy, 1)
    policy._overhead = 0.02
    asked = [begins(policy, 1) for _ in range(3000)]
    assert not any(asked[:100])
    assert any(asked)


def test_times_are_interpolated_and_extended():
    assert CPU.at("shallow", 0) == 0
    assert CPU.at("shallow", 1) == 5e-3
    assert CPU.at("deep", 4) == pytest.approx(15e-3 + 2e-3 * 3 / 7)
    assert CPU.at("plain", 15) == pytest.approx(24e-3)
    assert CPU.at("plain", np.array([0, 1, 8, 15, 22])) == pytest.approx(np.array([0, 20, 22, 24, 26]) * 1e-3)
    assert StepTimes((1,), (1.0,), (2.0,), (3.0,), (4.0,)).at("plain", np.array([0, 1, 5])).tolist() == [0, 4, 4]


def test_a_slow_size_is_filled_up_to_a_faster_one():
    seconds = {1: 3.0, 2: 4.0, 3: 2.0, 4: 5.0}
    times, _ = measure(lambda shape: [seconds[shape.tokens]] * 4, longest=4)
    assert times.sizes == (1, 2, 3, 4)
    step = times.of_exit(0)
    assert step == StepTimes((1, 2, 3, 4), *[(2.0, 2.0, 2.0, 5.0)] * 3, (3.0, 4.0, 2.0, 5.0))
    assert [float(step.spare(n)) for n in range(7)] == [0, 1, 2, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("plain", "copied"), [((20, 20, 20, 20), {}), ((20, 30, 20, 20), {0: 1}), ((20, 30, 30, 20), {0: 2})]
)
def test_a_slow_size_is_filled_with_unlikely_copies(plain: tuple[int, ...], copied: dict[int, int]):
    parts = {"shallow": (5e-3,) * 4, "head": (2e-4,) * 4, "deep": (15e-3, 16e-3, 17e-3, 18e-3)}
    policy = auto(StepTimes((1, 2, 3, 4), **parts, plain=tuple(1e-3 * n for n in plain)), sharpness=0.3)
    for _ in range(1000):
        policy._copying.learn(SHORTEST, 1, 0)
    assert begins(policy, 1)
    assert policy.decide(torch.arange(1), torch.tensor([0.01]), 0).keep.all()
    assert policy.append(lambda: [Repeat(SHORTEST, (5, 6, 7, 8))]) == copied


def test_sizes_that_take_their_share_are_not_timed():
    machine = Machine(1.0)
    times, _ = measure(machine.run, longest=128)
    assert times.sizes == (1, 2, 3, 4, 5, 6, 8, 12), "twelve tokens take twelve times as long as one"
    assert times.of_exit(0).at("plain", 100) == pytest.approx(100.0)
    assert measure(lambda shape: [1.0] * 4, longest=128)[0].sizes[-1] == 128


def test_each_exit_has_the_layers_below_and_above_it():
    none = (0.0,) * 6
    parts = PartTimes((1,), ((1.0,), (2.0,), (4.0,), (8.0,), (16.0,), (32.0,)), (none, none))
    assert parts.of_exit(0) == StepTimes((1,), (1.0,), (2.0,), (20.0,), (32.0,))
    assert parts.of_exit(1) == StepTimes((1,), (5.0,), (8.0,), (16.0,), (32.0,))


def test_it_drafts_from_the_exit_that_is_worth_most_and_learns_there():
    cheap, dear = replace(CPU, shallow=(1e-3, 2e-3)), replace(CPU, shallow=(12e-3, 13e-3))
    for times, expected in (([cheap, dear], 0), ([dear, cheap], 1)):
        policy = AutoPolicy([acceptance(), acceptance()], LONGEST)
        policy.times = times
        assert begins(policy, 1)
        assert policy.exit == expected
        assert policy.decide(torch.tensor([0]), torch.tensor([0.05]), expected).keep.item()
        policy.learn(0, 1, 0)
        corrections = [a.correction for a in policy._acceptances]
        assert corrections[expected] < 1 == corrections[1 - expected]
    policy = AutoPolicy([acceptance(sharpness=3.0), acceptance(sharpness=0.3)], LONGEST)
    policy.times = [CPU, CPU]
    assert begins(policy, 1)
    assert policy.exit == 1, "the better head, if both cost the same"


def ladder(next_layers: float, agreement_there: float) -> AutoPolicy:
    """Two exits; tokens that are unsure at the first one agree at the second one at this rate."""
    known = Acceptance([ENTROPY.tolist()], [np.exp(-ENTROPY).tolist()], [[agreement_there] * len(ENTROPY)])
    policy = AutoPolicy([known, acceptance()], LONGEST)
    second = CPU.shallow[0] + next_layers
    policy.times = [CPU, replace(CPU, shallow=(second, second))]
    begins(policy, 2)
    policy.exit = 0
    return policy


def test_an_unsure_token_is_taken_to_the_next_exit_if_that_pays():
    rows, unsure = torch.tensor([0, 1]), torch.tensor([3.9, 0.01])
    for next_layers, there, expected in ((1e-3, 0.9, [True, False]), (1e-3, 0.1, None), (40e-3, 0.9, None)):
        policy = ladder(next_layers, there)
        decision = policy.decide(rows, unsure, 0)
        assert decision.keep.tolist() == [False, True]
        assert (None if decision.deeper is None else decision.deeper.tolist()) == expected
    policy = ladder(1e-3, 0.9)
    policy.decide(rows, unsure, 0)
    decision = policy.decide(rows[:1], torch.tensor([0.02]), 1)
    assert decision.keep.tolist() == [True]
    assert decision.deeper is None, "there is no further exit"
    policy.learn(0, 1, 0)
    corrections = [a.correction for a in policy._acceptances]
    assert corrections[1] < 1 == corrections[0], "what the second exit said is learned there"


class Machine:
    """Takes some seconds for every part, and counts how often it is asked."""

    def __init__(self, seconds: float):
        self.seconds, self.asked = seconds, 0

    def run(self, shape: Shape) -> list[float]:
        self.asked += 1
        return [self.seconds * shape.tokens] * 4


def test_times_are_kept_from_start_to_start(tmp_path: Path):
    path = tmp_path / "cache" / "times.json"
    first, again = Machine(1.0), Machine(1.05)
    times = measured(path, first.run, longest=8)
    assert measured(path, again.run, longest=8) == times, "they still hold"
    assert again.asked < first.asked


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"[]",
        b"{}",
        b'{"sizes": [1]}',
        b'{"sizes": [], "parts": []}',
        b'{"sizes": [1], "parts": [[0]]}',
        b"\xff",
    ],
)
def test_kept_times_that_do_not_hold_are_measured_anew(tmp_path: Path, content: bytes | None):
    path = tmp_path / "times.json"
    measured(path, Machine(1.0).run, longest=8)
    if content is not None:
        path.write_bytes(content)
    slower = measured(path, Machine(1.5).run, longest=8)
    assert slower.parts[0][0] == 1.5
    assert measured(path, Machine(1.5).run, longest=8) == slower


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    times = measured(tmp_path / "file" / "times.json", Machine(1.0).run, longest=2)
    assert times.sizes == (1, 2)
    assert "measured at every start" in caplog.text


@dataclass
class Simulation:
    """Decoding with these times, a head whose entropies are uniform, and acceptance as calibrated (times ``truth``).

    Attributes:
        ahead: Whether what is drafted is looked at only every so many draft steps, as the policy says.
        prompts: Every so many rounds' steps have a prompt in them, which takes ``PROMPT`` seconds; 0 for none.
        slower: By how much everything takes longer than ``times`` say.
    """

    times: StepTimes
    sharpness: float
    truth: float = 1.0
    elapsed: float = 0.0
    ahead: bool = False
    prompts: int = 0
    slower: float = 1.0
    drafted_in: list[bool] = field(default_factory=list)

    def tokens_per_second(self, policy: Policy, rounds: int = 1500) -> float:
        draw = np.random.default_rng(0)  # the same text for every policy
        knots = draw.integers(len(ENTROPY), size=(rounds, LONGEST))
        luck = draw.uniform(size=(rounds, LONGEST))
        tokens, seconds = 0, 0.0
        if isinstance(policy, AutoPolicy):
            policy._clock = lambda: self.elapsed + self.slower * seconds
        table = torch.from_numpy(ENTROPY)
        for n in range(rounds):
            drafted: list[bool] = []
            fed = 0
            go_on, unseen = begins(policy, 1), 0
            while go_on:
                if not unseen:
                    unseen = min(policy.ahead(1), LONGEST - fed) if self.ahead else 1
                    seconds += unseen * (self.times.at("head", 1) + self.times.at("shallow", 1))
                    seconds -= self.times.at("shallow", 1) if fed == 0 else 0
                fed, unseen = fed + 1, unseen - 1
                knot = int(knots[n, fed - 1])
                decision = policy.decide(torch.tensor([0]), table[knot : knot + 1], policy.exit)
                kept = bool(decision.keep.item())
                if kept:
                    drafted.append(luck[n, fed - 1] < self.truth * np.exp(-self.sharpness * ENTROPY[knot]))
                go_on = kept and (decision.go_on or unseen > 0) and len(drafted) < LONGEST
            seconds += self.times.at("plain", 1) + self.times.at("deep", 1 + len(drafted)) - self.times.at("deep", 1)
            seconds += self.times.at("shallow", 1) if len(drafted) >= max(fed, 1) else 0
            self.drafted_in.append(fed > 0)
            accepted = [*drafted, False].index(False)
            if self.prompts and n % self.prompts == 0:
                seconds += PROMPT / self.slower
                policy.note_prompts()
            policy.learn(0, len(drafted), accepted)
            tokens += accepted + 1
        self.elapsed += self.slower * seconds
        return tokens / seconds


class FixedLength(FixedPolicy):
    """Always drafts the same number of tokens, possibly none."""

    def __init__(self, length: int):
        self.length = length

    def begin(self, lookup: Lookup = nothing, limits: Sequence[Limits | None] = ()) -> bool:
        self.left = self.length
        return self.length > 0

    def decide(self, rows: torch.Tensor, entropy: torch.Tensor, cut: int):  # type: ignore[no-untyped-def]
        self.left -= 1
        decision = super().decide(rows, entropy, cut)
        return type(decision)(decision.keep, self.left > 0)

    def ahead(self, n: int) -> int:
        return self.left


@pytest.mark.parametrize("times", [CPU, FREE, BOUND], ids=["memory-bound", "free", "compute-bound"])
@pytest.mark.parametrize("sharpness", [0.1, 0.4, 1.5])
def test_in_simulation_it_beats_every_fixed_length_and_plain_decoding(times: StepTimes, sharpness: float):
    world = Simulation(times, sharpness)
    fixed = max(world.tokens_per_second(FixedLength(n)) for n in range(LONGEST + 1))
    assert world.tokens_per_second(auto(times, sharpness=sharpness)) >= 0.99 * fixed


@pytest.mark.parametrize("times", [CPU, FREE, BOUND], ids=["memory-bound", "free", "compute-bound"])
@pytest.mark.parametrize("sharpness", [0.1, 0.4, 1.5])
def test_in_simulation_it_beats_every_fixed_length_with_few_looks(times: StepTimes, sharpness: float):
    """Steps that nobody has looked at are run in vain now and then; what they drafted is still chosen from."""
    world = Simulation(times, sharpness, ahead=True)
    fixed = max(world.tokens_per_second(FixedLength(n)) for n in range(LONGEST + 1))
    assert world.tokens_per_second(auto(times, sharpness=sharpness)) >= 0.97 * fixed


def test_it_looks_ahead_as_far_as_drafting_is_expected_to_pay():
    free, sure, unsure = auto(FREE), auto(CPU, sharpness=0.01), auto(CPU, sharpness=0.4)
    assert all(begins(policy, 1) for policy in (free, sure, unsure))
    assert free.ahead(1) == sure.ahead(1) == LONGEST
    assert 1 <= unsure.ahead(1) < LONGEST
    sure.decide(torch.tensor([0]), torch.tensor([0.0]), 0)
    assert sure.ahead(1) == LONGEST - 1
    assert FixedPolicy().ahead(1) >= LONGEST


@pytest.mark.parametrize("believed", [CPU, FREE], ids=["memory-bound", "free"])
def test_with_wrong_times_it_is_hardly_slower_than_plain_decoding(believed: StepTimes):
    world = Simulation(BOUND, 0.4)
    plain = world.tokens_per_second(FixedLength(0))
    policy = auto(believed, sharpness=0.4)
    world.tokens_per_second(policy, rounds=200)
    assert world.tokens_per_second(policy) >= 0.985 * plain
    assert world.tokens_per_second(FixedLength(2)) < 0.8 * plain, "it had something to lose"


TWICE_AS_SLOW = replace(CPU, head=(40e-3, 40e-3))
"""``CPU`` with heads that take so long that a token that is drafted costs twice what a plain one does, at least."""


@pytest.mark.parametrize("prompts", [0, 2, 1], ids=["alone", "a prompt in every second step", "in every step"])
@pytest.mark.parametrize("slower", [1.0, 3.0, 10.0])
def test_drafting_that_loses_is_off_within_fifty_rounds_and_costs_little(slower: float, prompts: int):
    world = Simulation(TWICE_AS_SLOW, 0.3, slower=slower, prompts=prompts)
    fixed, plain = (world.tokens_per_second(FixedLength(n), rounds=2000) for n in (1, 0))
    assert prompts or fixed < 0.55 * plain, "drafting is about twice as slow"
    policy = auto(CPU, sharpness=0.3)
    world.drafted_in.clear()
    assert world.tokens_per_second(policy, rounds=2000) >= (0.98 if prompts == 1 else 0.985) * plain
    rounds = 50 if prompts != 1 else 100
    assert any(world.drafted_in[:rounds]), "there was something to find out"
    assert fixed > 0.9 * plain or np.mean(world.drafted_in[rounds:]) < 0.03, "but for tries"


@pytest.mark.parametrize("prompts", [0, 2, 1])
def test_drafting_that_gains_goes_on_whatever_the_machine_and_the_prompts(prompts: int):
    world = Simulation(CPU, 0.3, slower=3.0, prompts=prompts)
    policy = auto(CPU, sharpness=0.3)
    world.tokens_per_second(policy, rounds=2000)
    assert np.mean(world.drafted_in[-1000:]) > 0.9


@pytest.mark.parametrize("truth", [0.0, 0.3])
def test_with_wrong_calibration_it_is_hardly_slower_than_plain_decoding(truth: float):
    world = Simulation(CPU, 0.3, truth)
    plain = world.tokens_per_second(FixedLength(0))
    assert world.tokens_per_second(auto(CPU, sharpness=0.3)) >= 0.98 * plain


def test_copies_go_on_where_asking_the_head_does_not_pay():
    now, asked, copied = 0.0, list[bool](), list[bool]()
    policy = AutoPolicy([acceptance(0.1)], LONGEST, clock=lambda: now)
    policy.times = [replace(CPU, head=(1e-4, 1e-4))]
    for n in range(400):
        repeat = Repeat(4, (1, 2, 3)) if n % 5 == 0 else Repeat()
        asks = begins(policy, 1, lambda repeat=repeat: [repeat])
        copies = bool(policy.copied)
        asked.append(asks)
        copied.append(copies)
        now += 0.02
        if copies:
            policy.learn(0, 3, 3)
        elif asks:
            policy.decide(torch.tensor([0]), torch.tensor([0.01]), 0)
            policy.learn(0, 1, 0)
            now += 0.03
    assert any(asked[:50])
    assert np.mean(asked[50:]) < 0.02
    assert np.mean(copied[50::5]) > 0.9


def test_long_contexts_make_verifying_and_drafting_dearer():
    slow = replace(CPU, attention=(1e-7, 2e-7, 3e-7, 4e-7))
    assert slow.at_context(MEASURED_CONTEXT) is slow
    assert slow.at_context(100) is slow
    far = slow.at_context(8192)
    extra = far.context - MEASURED_CONTEXT
    assert far.context == pytest.approx(8192, rel=0.12)
    assert far is slow.at_context(far.context), "times of like contexts are made once"
    for part, each in zip(("shallow", "head", "deep", "plain"), slow.attention, strict=True):
        assert far.at(part, 8) - slow.at(part, 8) == pytest.approx(8 * extra * each)
    policy = auto(replace(CPU, attention=(0.0, 0.0, 5e-6, 5e-6)), sharpness=0.3)
    assert policy.start(1, 128)
    assert policy.begin()
    assert policy.start(1, 8192)
    assert not policy.begin(), "a token more costs three quarters of a plain step there"


def test_attention_is_timed_in_short_and_long_contexts():
    def run(shape: Shape) -> list[float]:
        first, more = (1e-6, 4e-7) if not shape.spread else (0.0, 0.0)
        attention = shape.context * (first + more * (shape.tokens - 1))
        return [0.01 + attention, 0.01, 0.02 + 2 * attention, 0.03 + 3 * attention]

    times, undisturbed = measure(run, 8, most_context=LONG_CONTEXT)
    assert undisturbed
    assert times.attention[0] == pytest.approx((1e-6, 0, 2e-6, 3e-6))
    assert times.attention[1] == pytest.approx((4e-7, 0, 8e-7, 12e-7))
    assert times.of_exit(0).attention == pytest.approx((1e-6, 0, 8e-7, 3e-6))
    assert not any(measure(run, 8, most_context=300)[0].attention[0]), "contexts are short"


@dataclass
class Busy:
    """Takes 10 ms a step, or more while something else runs: at some sizes, or now and then."""

    sizes: tuple[int, ...] = ()
    every: int = 0
    until: float = np.inf
    asked: int = 0

    def run(self, shape: Shape) -> list[float]:
        self.asked += 1
        disturbed = shape.tokens in self.sizes or (self.every and self.asked % self.every)
        return [0.066 if disturbed and self.asked < self.until else 0.01] * 4


@pytest.mark.parametrize("busy", [Busy(sizes=(1, 3, 5)), Busy(every=4)], ids=["odd sizes", "most of the time"])
def test_times_of_a_busy_machine_are_taken_again_and_not_kept(
    busy: Busy, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "times.json"
    measured(path, busy.run, longest=8)
    assert not path.exists()
    assert "something else ran" in caplog.text
    tries = busy.asked
    busy.until = busy.asked + tries / TRIES / 2  # the first half of the first try
    assert measured(path, busy.run, longest=8).parts[0][0] == 0.01
    assert path.exists()
