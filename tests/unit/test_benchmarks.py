"""The benchmarks' own arithmetic."""

from pathlib import Path

import pytest

from benchmarks.engines import Run, Setup, speculative_config
from benchmarks.roofline import H100, SHAPES, best, speedup
from benchmarks.throughput import record, turns

SETUP = Setup("model", "heads", "bfloat16", True, 8, 4, 64)


def test_a_record_compares_each_repeat_with_plain_decoding_of_the_same_repeat():
    plain = [Run(2.0, [[1, 2], [3, 4]]), Run(4.0, [[1, 2], [3, 4]]), Run(1.0, [[1, 2], [3, 4]])]
    ours = [
        Run(1.0, [[1, 2], [3, 5]], drafts=3, drafted=4, accepted=2, accepted_at=[2, 0]),
        Run(1.0, [[1, 2], [3, 5]], drafts=3, drafted=4, accepted=2, accepted_at=[1, 1]),
        Run(1.0, [[1, 2], [3, 5]], drafts=2, drafted=2, accepted=1, accepted_at=[1, 0]),
    ]
    found = record(SETUP, Path("dir/prompts.jsonl"), "self-exit", 2, ours, plain)
    assert found["speedup_vs_ar"] == 2.0  # the median of 2, 4 and 1
    assert found["tokens_per_s"] == 4.0
    assert found["ms_per_token"] == 250.0
    assert found["acceptance_rate"] == 0.5
    assert found["acceptance_length"] == round(1 + 5 / 8, 3)
    assert found["accepted_at"] == [4, 1]
    assert found["identical_outputs"] == 1
    assert found["repeats"] == [4.0, 4.0, 4.0]
    assert record(SETUP, Path("p"), "ar", 2, plain, None)["speedup_vs_ar"] is None


def test_configurations_take_turns_in_alternating_order():
    order = [(width, name) for repeat, width, name in turns(["ar", "self-exit", "transformers:8"], [1, 8], 2)]
    assert order[:5] == [(1, "ar"), (1, "self-exit"), (1, "transformers:8"), (8, "ar"), (8, "self-exit")]
    assert order[5:] == [(1, "transformers:8"), (1, "self-exit"), (1, "ar"), (8, "self-exit"), (8, "ar")]


def test_configurations_are_spelled_and_misspelled_ones_refused():
    assert speculative_config("ar", SETUP) is None
    assert speculative_config("self-exit", SETUP) == {"method": "self_exit", "model": "heads"}
    layerskip = speculative_config("layerskip:8:3", SETUP)
    assert layerskip == {"method": "self_exit", "head": "shared", "exit_layer": 8, "num_speculative_tokens": 3}
    for wrong in ("plain", "fixed", "fixed:8", "ngram:3:4"):
        with pytest.raises(ValueError, match="there is no configuration"):
            speculative_config(wrong, SETUP)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_roofline_behaves(shape):  # type: ignore[no-untyped-def]
    quarter = shape.layers // 4
    assert speedup(H100, shape, quarter, 0.6, 1, 0) == 1.0
    gains = [best(H100, shape, quarter, acceptance, 1)[0] for acceptance in (0.3, 0.5, 0.7, 0.9)]
    assert gains == sorted(gains)
    assert all(gain >= 1 for gain in gains)


def test_on_paper_a_large_model_bound_by_arithmetic_gains_nothing():
    large = next(shape for shape in SHAPES if "70B" in shape.name)
    assert best(H100, large, 20, 0.6, 256) == (1.0, 0)
