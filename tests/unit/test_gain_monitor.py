"""What rounds took and yielded, and what that says about drafting."""

import numpy as np
import pytest

from vllm_earlyexit.engine.gain_monitor import (
    LASTING,
    RETRY,
    SATURATED,
    TRY,
    WARM_UP,
    GainMonitor,
    Seen,
)


def add(seen: Seen, drafts: bool, tokens: float, time: float) -> None:
    if drafts:
        seen.add("heads", tokens, time)
    else:
        seen.add_plain(time)


def test_rounds_that_were_disturbed_do_not_make_drafting_look_fast():
    seen = Seen(rounds=WARM_UP + 1)
    for seconds in (0.07, 0.06, *[0.03] * 8):
        for _ in range(4):
            seen.add("heads", 26 / 24, 0.035)
        seen.add_plain(seconds)
    assert seen.of["heads"].gain()[0] == pytest.approx(26 / 24 - 0.035 / 0.03)
    seen.probes = 100
    drafts = [bool(seen.start(["heads"])) for _ in range(200)]
    assert sum(drafts) <= TRY * (1 + 200 // RETRY), "but for tries now and then"


def test_a_round_that_took_a_hundred_times_as_long_is_one_round():
    seen = Seen(rounds=WARM_UP)
    for n in range(400):
        drafts = bool(seen.start(["heads"]))
        add(seen, drafts, 1.5, (3.0 if n == 150 else 0.035) if drafts else 0.03)
        if n > 100:
            assert seen.of["heads"].gain()[0] == pytest.approx(1.5 - 0.035 / 0.03, abs=0.01)


@pytest.mark.parametrize("faster", [0.9, 1.0, 1.1])
def test_a_machine_whose_speed_changes_does_not_change_what_drafting_is_worth(faster: float):
    seen = Seen(rounds=WARM_UP)
    for n in range(2000):
        speed = 1 + 0.5 * np.sin(n / 150)
        seen.rounds += 1
        if seen._probe():
            seen.add_plain(0.03 / speed)
        else:
            seen.add("heads", 1.4, 0.03 * 1.4 / faster / speed)
        if n > 200:
            assert seen.of["heads"].gain()[0] == pytest.approx(1.4 - 1.4 / faster, abs=0.04)


def test_plain_rounds_are_looked_at_more_often_while_they_are_in_doubt():
    def probes(spread: float) -> int:
        seen = Seen(rounds=WARM_UP)
        for n in range(1, 1025):
            seen.rounds += 1
            if seen._probe():
                seen.add_plain(0.045 * (1 + spread * (n * 7919 % 97 / 97 - 0.5)))
            else:
                seen.add("heads", 1.03, 0.048)
        return seen.probes

    assert 2 * probes(spread=0.0) < probes(spread=0.5)


def test_a_probe_waits_for_a_round_that_can_be_compared():
    """Where every second round has a prompt in it, probes that only fell on these would tell nothing."""
    seen = Seen(rounds=WARM_UP)
    for n in range(200):
        drafts = bool(seen.start(["heads"]))
        if n % 2:
            add(seen, drafts, 1.0, 0.06 if drafts else 0.03)
    assert seen.of["heads"].known
    assert seen.of["heads"].gain()[0] == pytest.approx(-1.0)


def test_a_bad_beginning_is_not_held_against_drafting_for_ever():
    seen, drafted = Seen(), list[bool]()
    for n in range(2 * LASTING + 1000):
        slow = n < 500
        drafts = bool(seen.start(["heads"]))
        drafted.append(drafts)
        add(seen, drafts, 1.5, 0.09 if slow and drafts else 0.03)
    assert sum(drafted[:WARM_UP]) == WARM_UP // 2, "while kernels are made nothing is compared"
    assert sum(drafted[50:500]) < 10
    assert sum(drafted[-1000:]) > 950


@pytest.mark.parametrize(("before", "after"), [(1.08, 0.92), (0.92, 1.08)])
def test_it_notices_within_a_thousand_rounds_that_drafting_is_worth_something_else(before: float, after: float):
    seen, draw, drafted = Seen(), np.random.default_rng(0), list[bool]()
    for n in range(4000):
        drafts, disturbed = bool(seen.start(["heads"])), float(np.exp(0.1 * draw.standard_normal()))
        drafted.append(drafts)
        faster = before if n < 2000 else after
        add(seen, drafts, 1.4, 0.03 * disturbed * (1.4 / faster if drafts else 1))
    assert (np.mean(drafted[1000:2000]) > 0.9) == (before > 1)
    assert (np.mean(drafted[3000:]) > 0.9) == (after > 1)
    assert not 0.2 < np.mean(drafted[1000:2000]) <= 0.9
    assert not 0.2 < np.mean(drafted[3000:]) <= 0.9


def test_it_notices_that_drafts_are_accepted_again():
    seen, drafted = Seen(), list[bool]()
    for n in range(4 * LASTING):
        drafts = bool(seen.start(["heads"]))
        drafted.append(drafts)
        accepted = n >= 2 * LASTING
        add(seen, drafts, 1.6 if accepted else 1.0, 0.033 if drafts else 0.03)
    assert np.mean(drafted[100 : 2 * LASTING]) < 0.1
    assert np.mean(drafted[-LASTING:]) > 0.9


def test_tries_cost_less_than_one_per_cent_of_the_time():
    seen, lost = Seen(), 0.0
    for _ in range(10_000):
        drafts = bool(seen.start(["heads"]))
        add(seen, drafts, 1.2, 0.09 if drafts else 0.03)
        lost += 0.06 if drafts else 0.0
    assert lost < 0.01 * 10_000 * 0.03


def test_kinds_of_drafts_are_judged_apart():
    seen = Seen(rounds=WARM_UP)
    for n in range(200):
        allowed = seen.start(["heads", "copies"])
        if not allowed:
            seen.add_plain(0.03)
        elif "copies" in allowed and n % 3 == 0:
            seen.add("copies", 4.0, 0.035)
        elif "heads" in allowed:
            seen.add("heads", 1.1, 0.06)
    assert "copies" in allowed
    assert "heads" not in allowed
    assert seen.of["heads"].realized() == 1.0, "nothing was expected of them"


def test_what_was_expected_is_compared_with_what_came_true():
    seen = Seen(rounds=WARM_UP)
    for _ in range(100):
        if seen.start(["heads"]):
            seen.add("heads", 1.4, 0.036, expected=0.4)
        else:
            seen.add_plain(0.03)
    assert seen.of["heads"].realized() == pytest.approx((1.4 - 1.2) / 0.4)


def test_rounds_beside_prompts_count_only_where_there_are_hardly_any_others():
    monitor = GainMonitor()
    assert monitor.note_prompts(False)
    assert [monitor.note_prompts(True) for _ in range(SATURATED)] == [False] * (SATURATED - 1) + [True]
    beside = monitor.of(4, 100)
    assert monitor.note_prompts(False)
    assert monitor.of(4, 100) is not beside


def test_batches_and_contexts_of_other_sizes_are_seen_apart():
    monitor = GainMonitor()
    assert monitor.of(8, 100) is monitor.of(9, 200)
    assert monitor.of(8, 100) is not monitor.of(16, 100)
    assert monitor.of(8, 100) is not monitor.of(8, 2000)
    assert monitor.of(8, 2000) is not monitor.of(8, 8000)
