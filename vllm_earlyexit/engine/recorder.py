"""Record what vLLM computes while it prefills: hidden states at the cuts and after the last layer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_earlyexit.engine.models import decoder_stack


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


class Recorder:
    """Forward hooks on a vLLM model that runs in this process, eagerly and without chunked prefill.

    Args:
        model: The loaded model.
        layers: Numbers of layers after which the hidden state is kept.
    """

    def __init__(self, model: nn.Module, layers: tuple[int, ...]):
        self._hidden: dict[int, torch.Tensor] = {}
        self._done: list[Prefill] = []
        stack = decoder_stack(model)[1].layers
        for layer in layers:
            stack[layer - 1].register_forward_hook(self._keep(layer))
        model.register_forward_hook(self._split, with_kwargs=True)

    def take(self) -> list[Prefill]:
        """Return the sequences since the last call; whoever calls owns their memory."""
        done, self._done = self._done, []
        return done

    def _keep(self, layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            hidden, residual = output  # vLLM's fused norms carry the two parts of the residual stream apart
            self._hidden[layer] = hidden + residual

        return hook

    def _split(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], final: torch.Tensor) -> None:
        ids, positions = kwargs["input_ids"], kwargs["positions"]
        starts = (positions == 0).nonzero().squeeze(-1).tolist()
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            self._done.append(
                Prefill(
                    ids[start:end].clone(),
                    {layer: hidden[start:end].clone() for layer, hidden in self._hidden.items()},
                    final[start:end].clone(),
                )
            )
        self._hidden = {}
