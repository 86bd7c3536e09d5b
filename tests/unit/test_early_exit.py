import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.helpers import make_heads, make_model
from vllm_earlyexit.config import EarlyExitConfig, knobs_from, resolve
from vllm_earlyexit.engine.early_exit import DOUBT, LOSSLESS, OFF, EarlyExits, Left, Limits, Promise, Wish, wish_of
from vllm_earlyexit.engine.frontier import Frontier
from vllm_earlyexit.engine.rounds import Round, Sampled
from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import PositionCalibration

STRICT = EarlyExitConfig("heads", (1, 2), 4, "entropy")
OPEN = EarlyExitConfig("heads", (1, 2), 4, "entropy", lowest_accuracy=0.8)
BY_DEFAULT = EarlyExitConfig("heads", (1, 2), 4, "entropy", early_exit_accuracy=0.95, lowest_accuracy=0.8)


def calibrated(*pairs: tuple[float, float]) -> PositionCalibration:
    entropy, probability = zip(*pairs, strict=True)
    return PositionCalibration(agreement=0.5, entropy=entropy, probability=probability, expected_calibration_error=0.0)


EASY = calibrated((0.0, 1.0), (1.0, 0.8), (2.0, 0.6), (3.0, 0.2))
HARD = calibrated((0.5, 0.9), (1.5, 0.5))


class TestWishes:
    @pytest.mark.parametrize(
        ("config", "asked", "wish"),
        [
            (STRICT, None, LOSSLESS),
            (OPEN, None, LOSSLESS),
            (OPEN, {"somebody_elses": 1}, LOSSLESS),
            (BY_DEFAULT, {}, Wish(accuracy=0.95)),
            (BY_DEFAULT, {"self_exit_mode": "lossless"}, LOSSLESS),
            (STRICT, {"self_exit_mode": "off"}, OFF),
            (OPEN, {"self_exit_mode": "early_exit"}, Wish(accuracy=0.8)),
            (BY_DEFAULT, {"self_exit_mode": "early_exit"}, Wish(accuracy=0.95)),
            (OPEN, {"early_exit_accuracy": 0.9}, Wish(accuracy=0.9)),
            (OPEN, {"early_exit_threshold": 1}, Wish(threshold=1.0)),
        ],
    )
    def test_what_is_asked_for_is_understood(self, config: EarlyExitConfig, asked: Any, wish: Wish):
        assert wish_of(asked, config) == wish

    @pytest.mark.parametrize(
        ("config", "asked", "words"),
        [
            (STRICT, {"early_exit_accuracy": 0.9}, "needs? its knob lowest_accuracy|knob lowest_accuracy"),
            (OPEN, {"early_exit_accuracy": 0.7}, "at least 0.8 here"),
            (OPEN, {"early_exit_accuracy": 1.0}, "below 1"),
            (OPEN, {"early_exit_accuracy": "high"}, "'high' is not a number"),
            (OPEN, {"early_exit_accuracy": True}, "True is not a number"),
            (OPEN, {"early_exit_acuracy": 0.9}, "there is no 'early_exit_acuracy'"),
            (OPEN, {"self_exit_mode": "fast"}, "'fast' is none of"),
            (OPEN, {"self_exit_mode": "off", "early_exit_accuracy": 0.9}, "needs self_exit_mode=early_exit, not off"),
            (OPEN, {"early_exit_accuracy": 0.9, "early_exit_threshold": 1.0}, "exclude each other"),
        ],
    )
    def test_what_cannot_be_had_is_refused_in_a_sentence(self, config: EarlyExitConfig, asked: Any, words: str):
        with pytest.raises(EarlyExitError, match=words):
            wish_of(asked, config)


class TestKnobs:
    @pytest.fixture
    def resolved(self, tmp_path: Any) -> Any:
        model = make_model(tmp_path / "model")

        def resolve_with(mapped: bool = True, **knobs: Any) -> EarlyExitConfig:
            heads = make_heads(tmp_path / "heads", model, mapped=mapped)
            found = knobs_from({"method": "self_exit", "model": str(heads)} | knobs, None, None, None)
            assert found is not None
            return resolve(found, str(model))

        return resolve_with

    def test_nobody_exits_early_unless_the_operator_says_so(self, resolved: Any):
        assert not resolved().exits_early
        assert resolved(lowest_accuracy=0.9).exits_early
        assert resolved(lowest_accuracy=0.9).early_exit_accuracy is None

    def test_the_mode_sets_what_is_open(self, resolved: Any):
        config = resolved(mode="early_exit")
        assert (config.early_exit_accuracy, config.lowest_accuracy, config.fill_in) == (0.9, 0.9, "resume")
        config = resolved(mode="early_exit", early_exit_accuracy=0.95, lowest_accuracy=0.7, fill_in="propagate")
        assert (config.early_exit_accuracy, config.lowest_accuracy, config.fill_in) == (0.95, 0.7, "propagate")
        assert config.check_rate > 0

    @pytest.mark.parametrize(
        ("knobs", "words"),
        [
            ({"early_exit_accuracy": 0.9}, "belongs to mode='early_exit'"),
            ({"fill_in": "propagate"}, "fill_in needs early exits"),
            ({"mode": "early_exit", "early_exit_accuracy": 0.7, "lowest_accuracy": 0.8}, "below lowest_accuracy"),
            ({"mode": "early_exit", "mapped": False}, "lack the calibration"),
            (
                {"mode": "early_exit", "model": None, "head": "shared", "exit_layer": 1},
                "head='shared' is not calibrated",
            ),
            ({"mode": "fast"}, "mode='fast' does not work"),
        ],
    )
    def test_contradictions_are_refused(self, resolved: Any, knobs: dict[str, Any], words: str):
        with pytest.raises(EarlyExitError, match=words):
            resolved(**knobs)


class TestThresholds:
    def test_they_hold_on_average(self):
        assert EASY.threshold(0.95) == pytest.approx(0.5)  # of knots with mean rates 1, 0.9, 0.8, 0.65
        assert EASY.threshold(0.9) == pytest.approx(1.0)
        assert EASY.threshold(0.8) == pytest.approx(2.0)
        assert EASY.threshold(0.1) == 3.0
        assert HARD.threshold(0.95) == -math.inf

    @pytest.mark.parametrize("accuracy", [0.6, 0.75, 0.9, 0.97])
    def test_tokens_up_to_them_agree_as_often(self, accuracy: float):
        entropies = np.linspace(0.0, 3.0, 61)
        fine = calibrated(*zip(entropies.tolist(), np.exp(-entropies).tolist(), strict=True))
        drawn = np.random.default_rng(0)
        tokens = drawn.uniform(0, 3, 200_000)
        leave = tokens <= fine.threshold(accuracy)
        agree = drawn.uniform(size=len(tokens)) < np.exp(-tokens)
        assert agree[leave].mean() == pytest.approx(accuracy, abs=0.02)


class TestLimits:
    def test_by_exit_and_position(self):
        early = EarlyExits(OPEN, [(EASY, HARD), (EASY,)])
        limits = early.limits(Wish(accuracy=0.9))
        assert limits is not None
        assert limits.at(0, 0) == EASY.threshold(0.9, DOUBT) == pytest.approx(1.0, abs=0.01)
        assert limits.at(0, 1) == limits.at(0, 7) == HARD.threshold(0.9, DOUBT) == pytest.approx(0.5, abs=0.01)
        assert limits.at(1, 7) == EASY.threshold(0.9, DOUBT)
        assert early.limits(LOSSLESS) is None
        assert early.limits(OFF) is None

    def test_a_threshold_is_never_above_what_the_lowest_accuracy_allows(self):
        early = EarlyExits(OPEN, [(EASY,)])
        assert early.limits(Wish(threshold=1.5)) == Limits(((1.5,),))
        assert early.limits(Wish(threshold=100.0)) == Limits(((EASY.threshold(0.8, DOUBT),),))
        assert early.limits(Wish(threshold=-1.0)) == Limits(((-1.0,),))

    def test_memory_stays_bounded(self):
        early = EarlyExits(OPEN, [(EASY,)])
        for n in range(1000):
            early.limits(Wish(threshold=n / 1000))
        assert len(early._known) <= 257


class TestPromise:
    def test_it_is_believed_at_first(self):
        assert Promise().correction == 1.0

    def test_heads_that_err_twice_as_often_still_keep_it(self):
        """Entropies are uniform over 0 to 3 nats and tokens err twice as often as calibration says."""
        entropies = np.linspace(0.0, 3.0, 61)
        promised = calibrated(*zip(entropies.tolist(), (1 - entropies / 6).tolist(), strict=True))
        early, drawn = EarlyExits(OPEN, [(promised,)]), random.Random(0)
        kept: list[bool] = []
        begun = early.limits(Wish(accuracy=0.85))
        assert begun is not None
        for _ in range(20_000):
            limits, unsure = early.limits(Wish(accuracy=0.85)), drawn.uniform(0, 3)
            assert limits is not None
            if unsure <= limits.at(0, 0):
                kept.append(drawn.random() > unsure / 3)
                early.checked(Left(0, limits.accuracy), kept[-1])
        assert early.promise.correction > 1.5
        assert len(kept) > 2000
        assert np.mean(kept[-2000:]) > 0.83
        assert 1 - begun.at(0, 0) / 6 < 0.75, "what they would agree on average without correction"

    @pytest.mark.parametrize("surest_err", [0.0, 0.15])
    def test_tokens_that_never_erred_in_calibration_are_doubted_too(self, surest_err: float):
        """They are two of three tokens, and err the more often the less sure they are."""
        knots = [(n / 10, 1.0 if n < 20 else 0.8) for n in range(30)]
        early, drawn = EarlyExits(OPEN, [(calibrated(*knots),)]), random.Random(0)
        kept: list[bool | None] = []
        for _ in range(20_000):
            limits, unsure = early.limits(Wish(accuracy=0.98)), drawn.uniform(0, 3)
            assert limits is not None
            kept.append(None)
            if unsure <= limits.at(0, 0):
                kept[-1] = drawn.random() > surest_err + unsure / 10
                early.checked(Left(0, limits.accuracy), kept[-1])
        assert sum(one is not None for one in kept[:100]) > 20
        late = [one for one in kept[10_000:] if one is not None]
        if surest_err:
            assert len(late) < 100, "none of them is as good as promised"
        else:
            assert len(late) > 500
            assert np.mean(late) > 0.97

    def test_it_is_tried_again_when_nothing_leaves(self):
        promise = Promise()
        for _ in range(20):
            promise.learn(0.9, agreed=False)
        assert promise.correction > 2
        for _ in range(Promise.IDLE):
            promise.emitted(left=False)
        assert promise.correction > 2
        promise.emitted(left=True)
        for _ in range(Promise.IDLE):
            promise.emitted(left=False)
        assert promise.correction > 2, "it fades only where nothing left for long"
        for _ in range(20_000):
            promise.emitted(left=False)
        assert promise.correction == 1.0

    def test_nothing_leaves_any_more_where_sure_tokens_are_wrong(self):
        """One token in five is sure, and every second of these is wrong; one sequence in twenty is checked."""
        config = EarlyExitConfig("heads", (1,), 4, "entropy", lowest_accuracy=0.9, check_rate=0.05)
        promised = calibrated(*zip([0.0, 1.0, 2.0], [0.999, 0.99, 0.5], strict=True))
        early, drawn = EarlyExits(config, [(promised,)]), random.Random(0)
        left = []
        for _ in range(20_000):
            limits = early.limits(Wish(accuracy=0.95))
            assert limits is not None
            leaves = drawn.random() < 0.2 and limits.at(0, 0) > 0
            if leaves and early.checks():
                early.checked(Left(0, limits.accuracy), agreed=drawn.random() < 0.5)
            early.emitted([Left(0, limits.accuracy)] if leaves else [], others=not leaves)
            left.append(leaves)
        assert sum(left[:1000]) > 20
        assert sum(left[1000:]) < 0.02 * len(left)

    def test_a_threshold_promises_nothing(self):
        early = EarlyExits(OPEN, [(EASY,)])
        limits = early.limits(Wish(threshold=1.0))
        assert limits is not None
        for _ in range(500):
            early.checked(Left(0, limits.accuracy), agreed=False)
        assert early.promise.correction == 1.0
        assert early.counts["checked_tokens"] == 500
        assert early.counts["agreed_tokens"] == 0


def test_checks_come_at_their_rate():
    early = EarlyExits(EarlyExitConfig("heads", (1,), 4, "entropy", lowest_accuracy=0.8, check_rate=0.05), [(EASY,)])
    for _ in range(200):
        assert early.checks(), "trust has to be earned"
        early.checked(Left(0, 0.9), agreed=True)
    assert sum(early.checks() for _ in range(1000)) == pytest.approx(50, abs=1)
    assert not any(EarlyExits(OPEN, [(EASY,)]).checks() for _ in range(1000))
    for _ in range(100):
        early.checked(Left(0, 0.9), agreed=False)
    assert all(early.checks() for _ in range(100)), "a promise that is not kept is watched"


def test_tokens_are_final_only_in_the_draft_in_which_they_left():
    request = object()
    frontier = Frontier([5], [7], [4], "cpu")
    for token, left in [(11, True), (12, False), (13, True)]:
        assert frontier.step is not None
        frontier.keep({"hidden": torch.zeros(1, 2)}, cut=0)
        frontier.advance(torch.tensor([token]), torch.tensor([True]), {0: Left(0, 0.9)} if left else {})
    of = Round(frontier, [request], [Sampled(0, 5, 7, 4)])
    assert set(of.final(request, [11, 12, 13])) == {0, 2}
    assert set(of.final(request, [11, 12])) == {0}
    assert set(of.final(request, [11, 99, 13])) == {0}
    assert not of.final(request, [99, 12, 13])
    assert not of.final(object(), [11, 12, 13])
