"""Exit-headed architectures: an existing vLLM model class, cut into segments that run one after the other."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import set_current_vllm_config
from vllm.sequence import IntermediateTensors

from vllm_earlyexit.engine.seams import pipeline_stage
from vllm_earlyexit.engine.sizes import Passes, with_rows
from vllm_earlyexit.errors import EarlyExitError

PREFIX = "Exit"
BASES = {
    "LlamaForCausalLM": "vllm.model_executor.models.llama",
    "Qwen2ForCausalLM": "vllm.model_executor.models.qwen2",
}


def plain_architecture(architectures: Sequence[str]) -> str:
    """Return which of a model's architectures can be cut.

    Raises:
        EarlyExitError: there is none.
    """
    for name in architectures:
        if name.removeprefix(PREFIX) in BASES:
            return name.removeprefix(PREFIX)
    raise EarlyExitError(
        f"self-exit: architecture {', '.join(architectures)} is not supported; supported are {', '.join(BASES)}"
    )


class Segment:
    """Layers ``start`` to ``end`` of a model, run as a pipeline stage of their own; all weights are the model's.

    vLLM's pipeline-parallel models run a range of layers and hand hidden states on. A segment is a shallow copy of
    the model with another range, run while the pipeline group answers for that range.
    """

    def __init__(self, model: nn.Module, start: int, end: int, passes: Passes):
        self.start, self.end = start, end
        name, inner = decoder_stack(model)
        self._first, self._last = start == 0, end == len(inner.layers)
        self._passes = passes
        stage = copy.copy(inner)
        stage.start_layer, stage.end_layer = start, end
        if not inner.do_not_compile:
            _give_own_graph(stage)
        self._model = cast(Any, copy.copy(model))
        self._model._modules = {**model._modules, name: stage}
        self._model._segments = ()

    def __call__(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> IntermediateTensors | torch.Tensor:
        """Run the segment over [num_tokens] tokens within a forward context.

        Returns:
            What a pipeline stage returns: ``IntermediateTensors`` at a cut, [num_tokens, hidden_size] hidden states
            after the final norm at the top.
        """
        tokens = {"positions": positions, "input_ids": input_ids, "inputs_embeds": inputs_embeds}
        at_cut = {} if intermediate is None else intermediate.tensors

        def run(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
            state = IntermediateTensors({name: inputs[name] for name in at_cut}) if at_cut else None
            with pipeline_stage(first=self._first, last=self._last):
                found = self._model.forward(
                    inputs.get("input_ids"), inputs["positions"], state, inputs.get("inputs_embeds")
                )
            return found if isinstance(found, torch.Tensor) else found.tensors

        given = {name: tensor for name, tensor in tokens.items() if tensor is not None}
        found = self._passes.run(run, given | at_cut)
        return found if isinstance(found, torch.Tensor) else IntermediateTensors(found)


def _give_own_graph(stage: Any) -> None:
    """Make ``stage``, a shallow copy of a model that vLLM compiles, compile and cache a graph of its own."""
    base = type(stage)
    stage.__class__ = with_own_forward(base, f"{base.__name__}Layers{stage.start_layer}To{stage.end_layer}")
    stage.__dict__.pop("aot_compiled_fn", None)
    stage.was_aot_compile_fn_loaded_from_disk = False
    stage._compile_tag = f"layers_{stage.start_layer}_{stage.end_layer}"
    with set_current_vllm_config(stage.vllm_config), set_model_tag(stage._compile_tag):
        TorchCompileWithNoGuardsWrapper.__init__(stage)


def with_own_forward(base: type, name: str) -> type:
    """Return a subclass of a compiled module's class with this name; vLLM's cache knows graphs by it."""

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    forward.__qualname__ = f"{name}.forward"
    return type(name, (base,), {"forward": forward, "__module__": base.__module__})


def run_segments(
    segments: Sequence[Segment],
    input_ids: torch.Tensor | None,
    positions: torch.Tensor,
    intermediate: IntermediateTensors | None = None,
    inputs_embeds: torch.Tensor | None = None,
    at_cut: Callable[[int, IntermediateTensors], None] | None = None,
) -> IntermediateTensors | torch.Tensor:
    """Run segments one after the other; arguments and result as in ``Segment.__call__``.

    Args:
        segments: At least one.
        input_ids: See there.
        positions: See there.
        intermediate: See there.
        inputs_embeds: See there.
        at_cut: Called with what passes a cut, and after how many layers it lies.
    """
    state: torch.Tensor | IntermediateTensors | None = intermediate
    for segment in segments:
        assert state is None or isinstance(state, IntermediateTensors)
        state = segment(input_ids, positions, state, inputs_embeds)
        if at_cut is not None and isinstance(state, IntermediateTensors):
            at_cut(segment.end, state)
    assert state is not None
    return state


def decoder_stack(model: nn.Module) -> tuple[str, Any]:
    """Return the name and the child of ``model`` that holds ``layers``, ``start_layer`` and ``end_layer``."""
    for name, child in model.named_children():
        if hasattr(child, "start_layer") and hasattr(child, "layers"):
            return name, child
    raise EarlyExitError(f"self-exit: {type(model).__name__} has no layer range to cut; it is not a pipeline model")


def query_key_value(attention: Any, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what an attention module projects [n, hidden_size] to: [n, q_size] and twice [n, kv_size]."""
    qkv, _ = attention.qkv_proj(normed)
    return qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)


def residual_stream(at_cut: IntermediateTensors) -> torch.Tensor:
    """Return the hidden states at a cut, [num_tokens, hidden_size], as transformers reports them per layer.

    vLLM's fused norms carry the last layer's output and the residual apart; their sum is the hidden state.
    """
    tensors = at_cut.tensors
    return tensors["hidden_states"] + tensors["residual"] if "residual" in tensors else tensors["hidden_states"]


class ExitMixin:
    """What ``with_exits`` adds to a model class."""

    _segments: tuple[Segment, ...] = ()
    resume: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor | None] | None = None
    """Run instead of the segments where it returns something: from a batch's token ids and positions to final hidden
    states, [num_tokens, hidden_size]."""

    @functools.cached_property
    def passes(self) -> Passes:
        """What runs passes of this model's segments."""
        return Passes(decoder_stack(self)[1].vllm_config)  # type: ignore[arg-type]

    def segments(self, cuts: Sequence[int]) -> list[Segment]:
        """Return the segments between the bottom, each of ``cuts`` and the top."""
        top = len(decoder_stack(self)[1].layers)  # type: ignore[arg-type]
        edges = [0, *cuts, top]
        if any(low >= high for low, high in pairwise(edges)):
            raise EarlyExitError(f"self-exit: cuts {list(cuts)} must rise within 1 to {top - 1}")
        return [Segment(self, low, high, self.passes) for low, high in pairwise(edges)]  # type: ignore[arg-type]

    def cut(self, cuts: Sequence[int]) -> list[Segment]:
        """Run the model as these segments, one after the other, from now on; return them.

        A compiled model thus has one graph for each segment and none for the whole.
        """
        segments = self.segments(cuts)
        self._segments = tuple(segments)
        return segments

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Run all segments; without any, the model as it was."""
        if not self._segments:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)  # type: ignore[misc]
        if self.resume is not None and (resumed := self.resume(input_ids, positions)) is not None:
            return resumed
        return run_segments(
            self._segments, input_ids, positions, intermediate_tensors, inputs_embeds, at_cut=self.at_cut
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the model's logits, [n, vocab_size], of hidden states after the final norm, [n, hidden_size]."""
        count = len(hidden_states)
        more = self.passes.more(count) if self._segments else 0
        if more == 0:
            return super().compute_logits(hidden_states)  # type: ignore[misc]
        padded = super().compute_logits(with_rows(hidden_states, more))  # type: ignore[misc]
        return None if padded is None else padded[:count]

    def at_cut(self, layer: int, state: IntermediateTensors) -> None:
        """Called by ``forward`` with what passes the cut after ``layer`` layers; does nothing here."""

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the model's own final norm to [num_tokens, hidden_size]."""
        return decoder_stack(self)[1].norm(hidden)  # type: ignore[arg-type]


@functools.cache
def with_exits(base: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a vLLM model class that can also be run in segments.

    Raises:
        EarlyExitError: the class cannot be run as pipeline stages.
    """
    if not getattr(base, "supports_pp", False):
        raise EarlyExitError(f"self-exit: {base.__name__} does not support pipeline stages, so it cannot be cut")
    return type(PREFIX + base.__name__, (ExitMixin, base), {"__module__": __name__, "__doc__": base.__doc__})


def __getattr__(name: str) -> type[nn.Module]:
    """Build ``ExitLlamaForCausalLM`` and its like when vLLM's registry asks for them."""
    plain = name.removeprefix(PREFIX)
    if name.startswith(PREFIX) and plain in BASES:
        from importlib import import_module

        return with_exits(getattr(import_module(BASES[plain]), plain))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
