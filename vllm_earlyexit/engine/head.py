"""Exit heads as the engine runs them: from hidden states at a cut to a token and how sure the head is of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear

from vllm_earlyexit.engine.models import decoder_stack, query_key_value, with_own_forward
from vllm_earlyexit.engine.ranks import gathered, own_part, rows_of
from vllm_earlyexit.engine.sizes import Passes
from vllm_earlyexit.heads.checkpoint import as_int8
from vllm_earlyexit.heads.modules import Context
from vllm_earlyexit.heads.uncertainty import entropy

ABSENT = -1e4
"""Logit of tokens that a head cannot draft: finite, so that a mask on all others shows."""


class Asked(NamedTuple):
    """What a head says about n tokens.

    Attributes:
        features: What it makes of them, after the final norm, [n, hidden_size].
        token_ids: Its first choices, int64 [n].
        entropy: In nats, float32 [n]; NaN where the head's logits are not numbers.
    """

    features: torch.Tensor
    token_ids: torch.Tensor
    entropy: torch.Tensor


class Head(Protocol):
    """A head at its cut."""

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor, previous: torch.Tensor) -> Asked:
        """Ask the head within the forward context of a draft step.

        Args:
            hidden: Hidden states at the cut, [n, hidden_size].
            positions: Of these tokens, int64 [n].
            previous: The features, or the final hidden states, of the tokens before them, [n, hidden_size].
        """

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits of features [n, hidden_size], float32 [n, vocab_size]; ``ABSENT`` where it cannot draft."""


class SharedExit:
    """LayerSkip's head: the model's final norm and lm_head. It has no calibration, so its entropy is said to be 0."""

    def __init__(self, model: Any):
        self._model = model

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor, previous: torch.Tensor) -> Asked:
        """Ask the head; see ``Head``."""
        features = self._model.final_norm(hidden)
        best = self._model.compute_logits(features).max(dim=-1)
        return Asked(features, best.indices, best.values.float() * 0)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """See ``Head``."""
        return self._model.compute_logits(features).float()


@dataclass(frozen=True)
class PagedLastLayer:
    """The last decoder layer's norm, K/V projection and attention over its own paged KV cache, at some positions.

    Keys and values of pending tokens are written to their own slots in the last layer's cache, where verification
    overwrites them; never what is not finite, because attention kernels multiply slots that they mask by 0. Use it
    within the forward context of a draft step.

    Attributes:
        layer: The last decoder layer.
        positions: Of the tokens that are drafted from, int64 [n].
    """

    layer: Any
    positions: torch.Tensor

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the last layer's input norm to [n, hidden_size]."""
        return self.layer.input_layernorm(hidden)

    def attend(self, query: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Attend with queries [n, query_size]; return [n, query_size]."""
        attention = self.layer.self_attn
        _, key, value = query_key_value(attention, normed)
        query, key = attention.rotary_emb(self.positions, own_part(query, attention.q_size), key)
        return gathered(attention.attn(query, key.nan_to_num(0, 0, 0), value.nan_to_num(0, 0, 0)))


@dataclass(frozen=True)
class DraftVocab:
    """The tokens that heads can draft, and lm_head's rows for them; all exits share one.

    Attributes:
        token_ids: int64 [draft_vocab_size].
        rows: From features [n, hidden_size] to logits [n, draft_vocab_size].
    """

    token_ids: torch.Tensor
    rows: nn.Module

    @staticmethod
    def of(vllm_config: VllmConfig, model: Any, token_ids: torch.Tensor | None) -> "DraftVocab | None":
        """Return the draft vocabulary of a loaded vLLM model; None for the full one."""
        if token_ids is None:
            return None
        weight, shard = model.lm_head.weight, model.lm_head.shard_indices
        token_ids = token_ids.to(weight.device)
        rows = rows_of(weight, shard.org_vocab_start_index, shard.num_org_elements, token_ids)
        with torch.device(weight.device), set_current_vllm_config(vllm_config):
            return DraftVocab(token_ids, as_vllm(linear_of(rows)))


@support_torch_compile(dynamic_arg_dims={"hidden": 0, "positions": 0, "previous": 0})
class TrainedExit(nn.Module):
    """A trained head, with the final norm and lm_head rows that it leans on; compiled as vLLM compiles models.

    Args:
        vllm_config: vLLM's.
        model: The exit-headed vLLM model.
        module: The trained part.
        vocab: What can be drafted; None for the full vocabulary.
    """

    def __init__(self, *, vllm_config: VllmConfig, model: Any, module: nn.Module, vocab: "DraftVocab | None"):
        super().__init__()
        stack, weight = decoder_stack(model)[1], model.lm_head.weight
        self._layer, self._norm = stack.layers[-1], stack.norm
        module = module.to(device=weight.device, dtype=weight.dtype).requires_grad_(False)
        with torch.device(weight.device):
            self._module = as_vllm(module)
        self._vocab = None if vocab is None else vocab.token_ids
        self._rows = None if vocab is None else vocab.rows
        self._model = [model]  # in a list, so that it is not a child

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, previous: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the fields of ``Asked``; arguments as in ``Head``."""
        features = self._norm(self._module(hidden, Context(PagedLastLayer(self._layer, positions), previous)))
        logits = self.logits(features)
        choice = logits.argmax(dim=-1)
        return features, choice if self._vocab is None else self._vocab[choice], entropy(logits)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits [n, draft_vocab_size] for features [n, hidden_size]."""
        return self._model[0].compute_logits(features) if self._rows is None else self._rows(features)


class CompiledExit:
    """A ``TrainedExit`` after ``layer`` layers as a ``Head``; other arguments as there."""

    def __init__(self, vllm_config: VllmConfig, model: Any, layer: int, module: nn.Module, vocab: "DraftVocab | None"):
        own: Any = with_own_forward(TrainedExit, f"{TrainedExit.__name__}{layer}")
        self._vocab, self._vocab_size = vocab, vllm_config.model_config.get_vocab_size()
        self._passes: Passes = model.passes
        with set_current_vllm_config(vllm_config), set_model_tag(f"exit_head_{layer}"):
            self.exit = own(vllm_config=vllm_config, model=model, module=module, vocab=vocab)

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor, previous: torch.Tensor) -> Asked:
        """Ask the head; see ``Head``."""
        given = {"hidden": hidden, "positions": positions, "previous": previous}

        def ask(inputs: Mapping[str, torch.Tensor]) -> Asked:
            return Asked(*self.exit(inputs["hidden"], inputs["positions"], inputs["previous"]))

        return self._passes.run(ask, given, pads=False)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """See ``Head``."""
        known = self.exit.logits(features).float()
        if self._vocab is None:
            return known
        return known.new_full((len(known), self._vocab_size), ABSENT).index_copy_(1, self._vocab.token_ids, known)


def linear_of(weight: torch.Tensor) -> nn.Linear:
    """Return a linear map with this weight, [out_features, in_features], and no bias."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return linear


class Int8Linear(nn.Module):
    """A linear map whose weights are int8 with a scale per row, its inputs with a scale per token; for CPUs.

    It reads half of what bfloat16 weights take, and reading them is what a draft step's time goes to. A head only
    drafts, so rounding changes how often it is right (hardly), never what is generated.

    Args:
        weight: [out_features, in_features].
        bias: [out_features], or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        whole, self._scale = as_int8(weight)  # the kernel keeps a copy of the former, and the address of the latter
        self.bias = bias
        self._kernel = ops.create_onednn_scaled_mm(
            whole.t(), self._scale, weight.dtype, dynamic_quant=True, use_azp=False
        )

    @staticmethod
    def serves(weight: torch.Tensor) -> bool:
        """Say whether this machine has kernels for it that are faster than those for ``weight``."""
        return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.cpu._is_vnni_supported()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [n, in_features] to [n, out_features]."""
        whole, scale, _ = ops.onednn_scaled_int8_quant(x)
        out = x.new_empty(len(x), self._kernel.n)
        return ops.onednn_scaled_mm(self._kernel, whole, out, scale, None, None, self.bias)


def as_vllm(module: nn.Module) -> nn.Module:
    """Return ``module`` with its linear maps replaced by vLLM's, which pack weights for the platform's kernels."""
    if not isinstance(module, nn.Linear):
        for name, child in module.named_children():
            setattr(module, name, as_vllm(child))
        return module
    weight, bias = module.weight, module.bias
    if Int8Linear.serves(weight):
        return Int8Linear(weight, bias)
    served: Any = ReplicatedLinear(
        module.in_features,
        module.out_features,
        bias=bias is not None,
        params_dtype=weight.dtype,
        return_bias=False,
        disable_tp=True,
    )
    served.weight.data.copy_(weight)
    if bias is not None:
        served.bias.data.copy_(bias)
    served.quant_method.process_weights_after_loading(served)
    return served
