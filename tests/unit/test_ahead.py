"""Async scheduling: a step is cut down to what was drafted, and the scheduler counts that."""

from types import SimpleNamespace

import numpy as np
import pytest
from vllm.v1.core.sched.output import CachedRequestData, GrammarOutput, SchedulerOutput

from vllm_earlyexit.engine import ahead


def step(scheduled: dict[str, int], rooms: dict[str, list[int]], computed: dict[str, int]) -> SchedulerOutput:
    """A step of requests that all ran before; ``computed`` as the scheduler counts it."""
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens, output.scheduled_spec_decode_tokens = scheduled, rooms
    output.total_num_scheduled_tokens = sum(scheduled.values())
    cached = CachedRequestData.make_empty()
    cached.req_ids, cached.num_computed_tokens = [*computed], [*computed.values()]
    output.scheduled_cached_reqs = cached
    return output


def test_a_step_is_cut_down_to_what_was_drafted():
    rooms = {"some": [-1] * 4, "none": [-1] * 4, "all": [-1] * 2, "known": [7, 8]}
    scheduled = {"some": 5, "none": 5, "all": 3, "known": 3, "prompt": 30}
    planned = step(scheduled, rooms, {"some": 104, "none": 54, "all": 12, "known": 9, "prompt": 64})
    drafted = {"some": 3, "all": 4, "known": 0, "gone": 1}
    run, surplus = ahead.cut_down(planned, drafted, {"some": 101, "none": 50, "gone": 3})
    assert run.num_scheduled_tokens == {"some": 4, "none": 1, "all": 3, "known": 3, "prompt": 30}
    assert run.total_num_scheduled_tokens == 41
    assert run.scheduled_spec_decode_tokens == {"some": [-1] * 3, "all": [-1] * 2, "known": [7, 8]}
    assert surplus == {"some": 1, "none": 4}
    cached = run.scheduled_cached_reqs
    assert dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True)) == {
        "some": 101,
        "none": 50,
        "all": 12,
        "known": 9,
        "prompt": 64,
    }


def test_what_the_scheduler_planned_is_not_changed():
    planned = step({"one": 5}, {"one": [-1] * 4}, {"one": 104})
    ahead.cut_down(planned, {}, {"one": 100})
    assert planned == step({"one": 5}, {"one": [-1] * 4}, {"one": 104})


def test_masks_of_tokens_that_are_not_run_are_taken_away():
    """Requests with room for 2, 0 and 3 draft tokens; one, none and two of these are not needed."""
    masks = np.arange(8, dtype=np.int32)[:, None].repeat(2, axis=1)
    grammar = GrammarOutput(["a", "b", "c"], masks, [1, 0, 2])
    left = ahead.without_surplus(grammar, {"a": 2, "c": 3, "not structured": 5}, {"a": 1, "c": 2, "not structured": 5})
    assert left.grammar_bitmask[:, 0].tolist() == [0, 1, 3, 4, 5]
    assert left.structured_output_request_ids == ["a", "b", "c"]
    assert left.num_acceptable_drafts == [1, 0, 2]
    assert len(grammar.grammar_bitmask) == 8


def test_the_scheduler_counts_what_was_drafted():
    output, scheduled = SimpleNamespace(), SimpleNamespace(num_invalid_spec_tokens={"a": 3, "b": 1, "c": 2})
    ahead.attach(SimpleNamespace(model_runner_output=output), {"a": 1, "b": 2, "d": 4})
    ahead.discount(scheduled, output)
    assert scheduled.num_invalid_spec_tokens == {"a": 3, "b": 2, "c": 2, "d": 4}


def test_a_scheduler_that_waited_counts_as_ever():
    output, scheduled = SimpleNamespace(), SimpleNamespace(num_invalid_spec_tokens=None)
    ahead.attach(output, {})
    ahead.discount(scheduled, output)
    assert scheduled.num_invalid_spec_tokens is None


@pytest.mark.parametrize(("num_tokens", "max_num_seqs"), [(8192, 1024), (2048, 256), (64, 8), (8, 8)])
def test_room_for_drafts_leaves_half_of_a_step_to_prompts(num_tokens: int, max_num_seqs: int):
    rooms = ahead.room(16, num_tokens, max_num_seqs)
    assert len(rooms) == max_num_seqs + 1
    assert all(0 <= longest <= 16 for longest in rooms)
    assert all(n * (1 + longest) <= num_tokens / 2 for n, longest in enumerate(rooms) if longest)
    assert rooms == sorted(rooms, reverse=True)
    assert rooms[1] == min(16, num_tokens // 2 - 1)
