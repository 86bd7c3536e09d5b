from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context, override_forward_context

from vllm_earlyexit.engine.sizes import MOST, NO_SLOT, Passes, padded_size, with_rows

NONE, PIECEWISE = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE
CAPTURED = {1: 2, 2: 2, 3: 4, 4: 4}


class Pass:
    """Doubles [n], and remembers in which context it was run, over which memory."""

    def __init__(self) -> None:
        self.modes: list[CUDAGraphMode] = []
        self.sizes: list[int | None] = []
        self.slots: list[list[int]] = []
        self.addresses: set[int] = set()
        self.out = torch.zeros(8)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        context: Any = get_forward_context()
        self.modes.append(context.cudagraph_runtime_mode)
        self.sizes.append(None if context.batch_descriptor is None else context.batch_descriptor.num_tokens)
        self.slots.append(context.slot_mapping["layer"].tolist())
        self.addresses.add(inputs["x"].data_ptr())
        return self.out[: len(inputs["x"])].copy_(2 * inputs["x"])


def context_of(mode: CUDAGraphMode, count: int, whole: int | None = None) -> Any:
    descriptor = None if whole is None else BatchDescriptor(num_tokens=whole)
    slots = {"layer": torch.arange(count)}
    context = SimpleNamespace(cudagraph_runtime_mode=mode, batch_descriptor=descriptor, slot_mapping=slots)
    return override_forward_context(context)  # type: ignore[arg-type]


@pytest.fixture
def passes() -> Passes:
    config = SimpleNamespace(
        device_config=SimpleNamespace(device_type="cuda"),
        lora_config=None,
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=4),
    )
    return Passes(config)  # type: ignore[arg-type]


@given(st.integers(1, 4 * MOST))
def test_a_pass_is_at_most_an_eighth_larger_and_small_or_large_ones_are_as_they_are(rows: int):
    size = padded_size(rows)
    assert rows <= size <= rows + rows / 8
    assert padded_size(size) == size
    if rows <= 16 or rows > MOST:
        assert size == rows


def test_there_are_few_sizes():
    assert len({padded_size(rows) for rows in range(1, MOST + 1)}) == 64
    assert len({padded_size(rows) for rows in range(32, 65)}) == 9


def test_rows_are_added_behind():
    table = torch.arange(6).reshape(3, 2)
    assert with_rows(table, 2).tolist() == [[0, 1], [2, 3], [4, 5], [0, 0], [0, 0]]
    assert with_rows(table[:, 0], 1).tolist() == [0, 2, 4, 0]


def test_a_pass_over_vllms_whole_batch_runs_as_vllm_says_over_memory_that_stays(passes: Passes):
    step = Pass()
    for values in ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0]):
        with context_of(PIECEWISE, len(values), whole=len(values)):
            assert passes.run(step, {"x": torch.tensor(values)}).tolist() == [2 * value for value in values]
    assert step.modes == [PIECEWISE, PIECEWISE]
    assert step.sizes == [4, 2]
    assert len(step.addresses) == 1


def test_a_pass_over_some_of_a_batch_never_replays_graphs_of_another_size(passes: Passes):
    """A graph of the whole batch would read other memory, and more of it."""
    step = Pass()
    with context_of(PIECEWISE, 4, whole=4):
        assert passes.run(step, {"x": torch.tensor([1.0, 2.0, 3.0])}).tolist() == [2.0, 4.0, 6.0]
        passes.replay(CAPTURED.get)
        found = passes.run(step, {"x": torch.tensor([1.0, 2.0, 3.0])})
        assert passes.run(step, {"x": torch.arange(5.0)}).tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
        assert found.tolist() == [2.0, 4.0, 6.0]  # though what a graph writes to was written to again
        assert get_forward_context().batch_descriptor == BatchDescriptor(num_tokens=4)
    assert step.modes == [NONE, PIECEWISE, NONE]
    assert step.sizes == [None, 4, None]
    assert step.slots == [[0, 1, 2], [0, 1, 2, NO_SLOT], [0, 1, 2, 3]]


def test_draft_steps_run_in_graphs_once_there_are_some(passes: Passes):
    step = Pass()
    for captured in (False, True):
        if captured:
            passes.replay(CAPTURED.get)
        with context_of(NONE, 1):
            passes.drafting()
            assert passes.run(step, {"x": torch.tensor([3.0])}).tolist() == [6.0]
        with context_of(NONE, 1):  # vLLM's own, in a mode without piecewise graphs
            passes.run(step, {"x": torch.tensor([3.0])})
    assert step.modes == [NONE, NONE, PIECEWISE, NONE]
    assert step.slots == [[0], [0], [0, NO_SLOT], [0]]
