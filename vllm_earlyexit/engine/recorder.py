"""Record what vLLM computes while it prefills: hidden states at the cuts and after the last layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from vllm.config import VllmConfig
from vllm.sequence import IntermediateTensors

from vllm_earlyexit.engine.models import BASES, ExitMixin, plain_architecture, residual_stream


@dataclass(frozen=True)
class Prefill:
    """One whole sequence as the model saw it.

    Attributes:
        ids: Its tokens, [num_tokens].
        hidden: Hidden states after so many layers, each [num_tokens, hidden_size].
        final: After the last layer and the final norm, [num_tokens, hidden_size].
    """

    ids: torch.Tensor
    hidden: dict[int, torch.Tensor]
    final: torch.Tensor


class RecordingMixin(ExitMixin):
    """A model that runs as segments and, when told to, keeps what passes its cuts; whole prefills, in this process."""

    layers: tuple[int, ...] = ()
    """Numbers of layers after which the hidden state is kept."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._kept: list[Prefill] | None = None
        self.cut(self.layers)

    def record(self) -> None:
        """Keep what is prefilled from now on."""
        self._kept = []

    def take(self) -> list[Prefill]:
        """Return what was kept and keep no more; whoever calls owns its memory."""
        kept, self._kept = self._kept or [], None
        return kept

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Run all segments; keep what they compute if told to."""
        self._hidden: dict[int, torch.Tensor] = {}
        final = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        if self._segments and self._kept is not None:
            assert input_ids is not None
            assert isinstance(final, torch.Tensor)
            self._kept += _sequences(input_ids, positions, self._hidden, final)
        return final

    def at_cut(self, layer: int, state: IntermediateTensors) -> None:
        """Keep the hidden states after ``layer`` layers."""
        if self._kept is not None:
            self._hidden[layer] = residual_stream(state)


def _sequences(
    ids: torch.Tensor, positions: torch.Tensor, hidden: dict[int, torch.Tensor], final: torch.Tensor
) -> list[Prefill]:
    starts = (positions == 0).nonzero().squeeze(-1).tolist()
    return [
        Prefill(
            ids[start:end].clone(),
            {layer: states[start:end].clone() for layer, states in hidden.items()},
            final[start:end].clone(),
        )
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)
    ]


def register_recorder(architectures: Sequence[str], layers: Sequence[int]) -> str:
    """Make a recording version of a model's architecture known to vLLM in this process; return its name.

    Raises:
        EarlyExitError: there is none.
    """
    from vllm import ModelRegistry

    plain = plain_architecture(architectures)
    base = getattr(import_module(BASES[plain]), plain)
    name = f"Recording{plain}"
    ModelRegistry.register_model(name, type(name, (RecordingMixin, base), {"layers": tuple(layers)}))
    return name
