"""What responses say of early exits."""

from types import SimpleNamespace
from typing import Any

from vllm_earlyexit.engine.responses import LEFT, attach, exits_of, keep


def test_exits_are_counted_up_to_where_a_stop_cut_the_output_off():
    assert exits_of({1: 2, 2: 4, 5: 2}, 4, 30) == {
        "mean_exit_depth": (30 + 2 + 4 + 30) / 4,
        "tokens_per_exit": {"2": 1, "4": 1, "30": 2},
    }
    assert exits_of({}, 0, 30) == {"mean_exit_depth": 0, "tokens_per_exit": {}}


def test_what_leaves_in_a_step_is_numbered_from_where_the_output_ends():
    request: Any = SimpleNamespace(num_output_tokens=7)
    scheduler = SimpleNamespace(requests={"here": request})
    output: Any = SimpleNamespace()
    attach(SimpleNamespace(model_runner_output=output), LEFT, {"here": {0: 2, 2: 4}, "aborted meanwhile": {0: 2}})
    keep(scheduler, output)
    request.num_output_tokens = 10
    attach(output, LEFT, {"here": {1: 2}})
    keep(scheduler, output)
    assert request.self_exit_left == {7: 2, 9: 4, 11: 2}
    keep(scheduler, SimpleNamespace())
    assert len(request.self_exit_left) == 3
