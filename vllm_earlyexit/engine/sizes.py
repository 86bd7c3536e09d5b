"""Passes over any number of tokens, run as one of few sizes.

On CPUs a size is one for which kernels exist already. vLLM's matrix products on CPUs are oneDNN's, which makes a kernel
for every number of rows and size of matrix that it meets, and keeps few of them: 32 for a layer, 1,024 in all. Plain
decoding meets one number of rows for every size of its batch. Drafts make that the number of tokens that were worth
drafting, so that kernels would be made again and again. With at most an eighth more rows there are 64 sizes.

On GPUs it is one for which vLLM has captured piecewise CUDA graphs: one for each piece of a model between two
attentions, replayed over the memory that it was captured over.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeVar

import torch
from torch.nn.functional import pad
from torch.utils._pytree import tree_map
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor, get_forward_context, override_forward_context

MOST, COARSEST = 512, 16
"""Rows from which on a kernel is made in little of the time that it runs, and rows between two sizes at most."""
NO_SLOT = -1
"""vLLM's slot of tokens whose KV is not kept."""

Tensors = Mapping[str, torch.Tensor]
Outputs = TypeVar("Outputs")


def applies(vllm_config: VllmConfig) -> bool:
    """Return whether to pad: on CPUs, without LoRA adapters, which have a number for every token of the batch."""
    return vllm_config.device_config.device_type == "cpu" and vllm_config.lora_config is None


def padded_size(rows: int) -> int:
    """Return the size to run so many rows as on a CPU, at least as many."""
    if rows > MOST:
        return rows
    step = min(COARSEST, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def with_rows(table: torch.Tensor, more: int) -> torch.Tensor:
    """Return [n, ...] with so many rows of zeros behind it."""
    return pad(table, (0, 0) * (table.dim() - 1) + (0, more))


class Passes:
    """Runs passes of a model's segments and exit heads over some tokens, within their forward context.

    Args:
        vllm_config: vLLM's.
    """

    def __init__(self, vllm_config: VllmConfig):
        self._pads = applies(vllm_config)
        self._largest = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self._memory: dict[str, torch.Tensor] = {}
        self._captured: Callable[[int], int | None] | None = None

    def replay(self, captured: Callable[[int], int | None]) -> None:
        """Run passes of ``drafting`` contexts in graphs from now on.

        Args:
            captured: From a number of tokens to the size whose graphs to replay; None if there are none for so many.
        """
        self._captured = captured

    @property
    def replays(self) -> bool:
        """Whether passes of ``drafting`` contexts run in graphs."""
        return self._captured is not None

    def drafting(self) -> None:
        """Take note that the current forward context is not that of vLLM's own batch."""
        if self.replays:
            get_forward_context().cudagraph_runtime_mode = CUDAGraphMode.PIECEWISE

    def more(self, count: int) -> int:
        """Return how many rows to add to so many on a CPU. None in a graph, whose numbers are symbols."""
        return padded_size(count) - count if self._pads and not torch.compiler.is_compiling() else 0

    def run(self, run: Callable[[Tensors], Outputs], inputs: Tensors, *, pads: bool = True) -> Outputs:
        """Run a pass over [n] tokens; return what it returns: tensors of n rows, alone or in containers.

        Where vLLM runs a batch in piecewise graphs, or captures them, that is what happens to a pass over all of it.
        A pass over some tokens has a size of its own.

        Args:
            run: Called once with tensors like ``inputs``, of at least as many rows.
            inputs: By name, each [n, ...].
            pads: Whether kernels are worth saving on a CPU.
        """
        count, context = len(next(iter(inputs.values()))), get_forward_context()
        if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            whole = context.batch_descriptor
            if whole is not None and whole.num_tokens == count:
                return run(self._held(inputs, count))
            return self._replayed(run, inputs, count)
        if pads and (more := self.more(count)):
            with as_many(count, count + more):
                return first_rows(run({name: with_rows(tensor, more) for name, tensor in inputs.items()}), count)
        return run(inputs)

    def _replayed(self, run: Callable[[Tensors], Outputs], inputs: Tensors, count: int) -> Outputs:
        """Run a pass in captured graphs, outside of them if there are none for so many tokens."""
        size = None if self._captured is None else self._captured(count)
        with as_many(count, size or count) as context:
            if size is None:
                context.cudagraph_runtime_mode, context.batch_descriptor = CUDAGraphMode.NONE, None
                return run(inputs)
            context.batch_descriptor = BatchDescriptor(num_tokens=size)
            outputs = run(self._held(inputs, size))
        return tree_map(torch.clone, first_rows(outputs, count))  # the next replay overwrites them

    def _held(self, inputs: Tensors, size: int) -> dict[str, torch.Tensor]:
        """Return [size, ...] of the memory that graphs read: inputs, and behind them what passes before have left."""
        for name, tensor in inputs.items():
            if name not in self._memory or len(self._memory[name]) < size:
                self._memory[name] = tensor.new_zeros(max(self._largest, size), *tensor.shape[1:])
            self._memory[name][: len(tensor)].copy_(tensor)
        return {name: self._memory[name][:size] for name in inputs}


def first_rows(outputs: Outputs, count: int) -> Outputs:
    """Return the first rows of each tensor in ``outputs``."""
    return tree_map(lambda tensor: tensor[:count], outputs)


@contextmanager
def as_many(count: int, size: int) -> Iterator[Any]:
    """A copy of the current forward context with ``size`` tokens, of which KV of the first ``count`` is kept."""
    context: Any = copy(get_forward_context())
    slots: Tensors = context.slot_mapping
    padded = {id(of_group): pad(of_group[:count], (0, size - count), value=NO_SLOT) for of_group in slots.values()}
    context.slot_mapping = {layer: padded[id(of_group)] for layer, of_group in slots.items()}
    with override_forward_context(context):
        yield context
