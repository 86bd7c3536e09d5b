"""CUDA graphs on a CPU: what stands for them reads and writes the memory that it was captured over, as they do.

Around each segment, each exit head and each fill-in is vLLM's own wrapper for graphs. A real model has one for each
piece between two attentions, which run outside; here attention runs inside, and likewise sees the forward context of
each replay.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves
from vllm.compilation import cuda_graph
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.compilation.monitor import set_cudagraph_capturing_enabled
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.v1.worker.gpu import cudagraph_utils, model_runner

SIZES = [1, 2, 4, 8, 16, 32]


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    """Return what an output consists of."""
    return tree_leaves(outputs.tensors if isinstance(outputs, IntermediateTensors) else outputs)


class RecordedGraph:
    """Stands for torch.cuda.CUDAGraph: runs again what it has recorded, on the same tensors and into the same."""

    recording: "RecordedGraph | None" = None
    replays = 0

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[[], Any], Any]] = []

    def replay(self) -> None:
        RecordedGraph.replays += 1
        for call, outputs in self.calls:
            for old, new in zip(tensors_of(outputs), tensors_of(call()), strict=True):
                old.copy_(new)


@contextmanager
def recording(graph: RecordedGraph, *_: Any, **__: Any) -> Iterator[None]:
    """Stand for torch.cuda.graph."""
    RecordedGraph.recording = graph
    yield
    RecordedGraph.recording = None


def recordable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, whose calls are recorded while a graph is."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        outputs = function(*arguments, **keywords)
        if RecordedGraph.recording is not None:
            RecordedGraph.recording.calls.append((lambda: function(*arguments, **keywords), outputs))
        return outputs

    return call


@contextmanager
def captured(runner: Any) -> Iterator[list[CUDAGraphWrapper]]:
    """Let a V2 runner of self-exit, and its speculator, capture piecewise graphs as on a GPU, and serve in them.

    Yields:
        vLLM's wrappers: of segments from the bottom up, of heads, of fill-in.
    """
    speculator, config, wrappers = runner.speculator, runner.vllm_config, list[CUDAGraphWrapper]()
    RecordedGraph.replays = 0

    def wrapped(function: Callable[..., Any]) -> CUDAGraphWrapper:
        wrappers.append(CUDAGraphWrapper(recordable(function), config, CUDAGraphMode.PIECEWISE))
        return wrappers[-1]

    with (
        patch.object(torch.cuda, "CUDAGraph", RecordedGraph),
        patch.object(torch.cuda, "graph", recording),
        patch.object(type(current_platform), "get_global_graph_pool", lambda self: None),
        patch.object(cuda_graph, "capture_pool", lambda *_: nullcontext()),
        patch.object(cuda_graph, "current_stream", lambda: None),
        patch.object(cuda_graph, "weak_ref_tensors", lambda outputs: outputs),
        patch.object(cudagraph_utils, "graph_capture", lambda **_: nullcontext()),
        patch.object(cudagraph_utils, "has_compiled_submodule", lambda model: True),
    ):
        for segment in runner.model._segments:
            modules = segment._model._modules
            modules["model"] = wrapped(modules["model"])
        for drafted_from in speculator.drafter.exits:
            drafted_from.head.exit = wrapped(drafted_from.head.exit)
        for fill_in in speculator.drafter.fill_ins.values():
            fill_in.project = wrapped(fill_in.project)
        compilation = config.compilation_config
        compilation.cudagraph_mode, compilation.cudagraph_capture_sizes = CUDAGraphMode.PIECEWISE, SIZES
        compilation.max_cudagraph_capture_size = max(SIZES)
        runner.cudagraph_manager = model_runner.ModelCudaGraphManager(
            config, runner.device, CUDAGraphMode.PIECEWISE, runner.decode_query_len
        )
        speculator.init_cudagraph_manager(CUDAGraphMode.PIECEWISE)
        set_cudagraph_capturing_enabled(True)
        runner.cudagraph_manager.capture(
            runner.model,
            runner.model_state,
            runner.input_buffers,
            None,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
        )
        speculator.capture()
        set_cudagraph_capturing_enabled(False)
        yield wrappers
