"""Minutes of mixed traffic; only with ``make test-soak``, which sets how many."""

import os
from pathlib import Path

import pytest

from benchmarks.soak import soak

MINUTES = os.environ.get("SOAK_MINUTES")


@pytest.mark.skipif(MINUTES is None, reason="make test-soak")
def test_answers_stay_right_and_nothing_leaks(smollm2: Path, prompts: list[str]):
    found = soak(smollm2, prompts, float(MINUTES or 0), clients=64, policy="entropy")
    assert found["failed"] == []
    assert all(count > 0 for count in found["requests"].values())
    assert found["greedy_parted"] == found["greedy_parted_at_near_ties"] <= found["requests"]["greedy"] / 50
    assert found["drafted"] > found["accepted"] > 0
    assert found["preemptions"] > 0
    assert (found["requests_left"], found["kv_cache_usage_at_end"], found["exit_code"]) == (0, 0, 0)
    assert found["memory_at_end"] < 1.02 * found["memory_after_warm_up"]
