"""KV of the layers that a token skipped, projected from its hidden state at the cut: no attention, no MLP."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update

from vllm_earlyexit.engine.models import decoder_stack, query_key_value, with_own_forward
from vllm_earlyexit.engine.sizes import Passes


@support_torch_compile(dynamic_arg_dims={"hidden": 0, "positions": 0})
class SkippedLayers(nn.Module):
    """What layers project for their KV caches: each with its own norm, K/V projection and rotary embedding.

    Args:
        vllm_config: vLLM's.
        layers: Decoder layers of the model.
    """

    def __init__(self, *, vllm_config: VllmConfig, layers: Iterable[nn.Module]):
        super().__init__()
        self._layers = nn.ModuleList(layers)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        """Return key and value of each layer in turn, [n, kv_size]; arguments as in ``FillIn``."""
        found: list[torch.Tensor] = []
        for layer in self._layers:
            attention: Any = layer.self_attn
            query, key, value = query_key_value(attention, layer.input_layernorm(hidden))  # type: ignore[operator]
            _, key = attention.rotary_emb(positions, query, key)
            found += [key, value]
        return found


class FillIn:
    """Writes the KV that the layers above a cut would write if they got the hidden states at the cut.

    Args:
        vllm_config: vLLM's.
        model: The exit-headed vLLM model.
        layer: How many layers lie below the cut.
    """

    def __init__(self, vllm_config: VllmConfig, model: Any, layer: int):
        layers = list(decoder_stack(model)[1].layers[layer:])
        own: Any = with_own_forward(SkippedLayers, f"{SkippedLayers.__name__}From{layer}")
        self._caches = [one.self_attn.attn for one in layers]
        self._passes: Passes = model.passes
        with set_current_vllm_config(vllm_config), set_model_tag(f"fill_in_{layer}"):
            self.project = own(vllm_config=vllm_config, layers=layers)

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor) -> None:
        """Fill in the KV of tokens within their forward context.

        Args:
            hidden: Hidden states at the cut, [n, hidden_size].
            positions: Of these tokens, int64 [n].
        """

        def project(inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
            return self.project(inputs["hidden"], inputs["positions"])

        found = self._passes.run(project, {"hidden": hidden, "positions": positions})
        for inner, key, value in zip(self._caches, found[::2], found[1::2], strict=True):
            heads = (len(hidden), inner.num_kv_heads, -1)
            unified_kv_cache_update(key.reshape(heads), value.reshape(heads), inner.layer_name)
