"""Drafting with the first segment and an exit head; free of model runners."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.sequence import IntermediateTensors

from vllm_earlyexit.config import EarlyExitConfig
from vllm_earlyexit.engine.frontier import Frontier
from vllm_earlyexit.engine.models import residual_stream
from vllm_earlyexit.engine.policy import Policy, build_policy
from vllm_earlyexit.engine.tail import PagedLastLayer
from vllm_earlyexit.heads.checkpoint import load_heads
from vllm_earlyexit.heads.modules import Context, SharedHead
from vllm_earlyexit.heads.uncertainty import entropy

KVContext = Callable[[torch.Tensor, torch.Tensor], AbstractContextManager[None]]
"""Given a round's rows and their positions, both int64 [n], a forward context of one token for each of them."""


@dataclass(frozen=True)
class Pending:
    """What of a batch is pending.

    Attributes:
        at: Indices of the pending tokens in the batch, int64 [num_pending].
        states: Their hidden states at the cut by name, each [num_pending, hidden_size].
        fresh: Indices of all other tokens, int64, rising.
    """

    at: torch.Tensor
    states: dict[str, torch.Tensor]
    fresh: torch.Tensor


def linear_of(weight: torch.Tensor) -> nn.Linear:
    """Return a linear map with this weight, [out_features, in_features], and no bias."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return linear


def as_vllm(module: nn.Module) -> nn.Module:
    """Return ``module`` with its linear maps replaced by vLLM's, which pack weights for the platform's kernels."""
    if not isinstance(module, nn.Linear):
        for name, child in module.named_children():
            setattr(module, name, as_vllm(child))
        return module
    weight, bias = module.weight, module.bias
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


class ExitHead:
    """A head at its cut: hidden states to logits over the draft vocabulary.

    Args:
        model: The exit-headed vLLM model, which lends its final norm and lm_head.
        module: The trained part.
        draft_vocab: Token ids that can be drafted, int64 [draft_vocab_size]; None for all of them.
        vllm_config: vLLM's.
    """

    def __init__(self, model: Any, module: nn.Module, draft_vocab: torch.Tensor | None, vllm_config: VllmConfig):
        weight = model.lm_head.weight
        self._model = model
        self._last = PagedLastLayer(model)
        self._vocab: torch.Tensor | None = None
        self._rows: Any = None
        module = module.to(device=weight.device, dtype=weight.dtype).requires_grad_(False)
        with set_current_vllm_config(vllm_config), torch.device(weight.device):
            self._module = as_vllm(module)
            if draft_vocab is not None:
                self._vocab = draft_vocab.to(weight.device)
                self._rows = as_vllm(linear_of(weight[self._vocab]))

    def features(self, hidden: torch.Tensor, positions: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Return what the head makes of hidden states at the cut, after the final norm, [n, hidden_size].

        Args:
            hidden: [n, hidden_size].
            positions: Of these tokens, int64 [n].
            previous: The features, or the final hidden states, of the tokens before them, [n, hidden_size].
        """
        self._last.positions = positions
        return self._model.final_norm(self._module(hidden, Context(self._last, previous)))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits [n, draft_vocab_size] for features [n, hidden_size]."""
        if self._rows is None:
            return self._model.compute_logits(features)
        return self._rows(features)

    def token_ids(self, choice: torch.Tensor) -> torch.Tensor:
        """Map indices into the draft vocabulary to token ids."""
        return choice if self._vocab is None else self._vocab[choice]


class SelfExitDrafter:
    """Drafts tokens for a batch of sequences, each until its policy or its limit says stop, and verifies them.

    Args:
        model: The loaded exit-headed vLLM model; its forward runs the drafter's segments from here on.
        config: The resolved setting.
        vllm_config: vLLM's.
    """

    def __init__(self, model: Any, config: EarlyExitConfig, vllm_config: VllmConfig):
        self._model = model
        self.shallow, self.deep = model.cut([config.exit_layer])
        if config.heads is None:
            self._head = ExitHead(model, SharedHead(), None, vllm_config)
            self.policy: Policy = build_policy(config, None)
        else:
            heads = load_heads(Path(config.heads))
            self._head = ExitHead(model, heads.modules[config.exit_layer], heads.draft_vocab, vllm_config)
            self.policy = build_policy(config, heads.config.exit(config.exit_layer))

    def draft(self, frontier: Frontier, previous: torch.Tensor, kv_context: KVContext) -> list[list[int]]:
        """Draft until every sequence has stopped; return the drafted tokens of each.

        Args:
            frontier: The sequences, each at its newest token; afterwards it holds what is pending.
            previous: The full model's final hidden state of the token before that, [num_seqs, hidden_size].
            kv_context: Where a step's KV is.
        """
        previous = previous.clone()
        if not self.policy.begin(frontier.num_seqs):
            return frontier.drafts()
        while (step := frontier.step) is not None:
            with kv_context(step.rows, step.positions):
                at_cut = self.shallow(step.input_ids, step.positions)
                assert isinstance(at_cut, IntermediateTensors)
                features = self._head.features(residual_stream(at_cut), step.positions, previous[step.rows])
            frontier.keep(at_cut.tensors)
            previous[step.rows] = features
            logits = self._head.logits(features)
            decision = self.policy.decide(step.rows, logits)
            frontier.advance(self._head.token_ids(logits.argmax(dim=-1)), decision.keep)
            if not decision.go_on:
                break
        return frontier.drafts()

    def verify(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        pending: Pending,
        fresh_context: Callable[[], AbstractContextManager[None]],
    ) -> torch.Tensor:
        """Run a batch through the model, resuming tokens that are pending at the cut.

        The forward context must be that of the whole batch.

        Args:
            input_ids: int32 [num_tokens].
            positions: int64 [num_tokens].
            pending: Which tokens are pending; the others are fed from the bottom.
            fresh_context: A forward context of those others, in batch order.

        Returns:
            Hidden states after the final norm, [num_tokens, hidden_size].
        """
        joined = {
            name: states.new_empty(len(positions), *states.shape[1:]).index_copy_(0, pending.at, states)
            for name, states in pending.states.items()
        }
        if len(pending.fresh):
            with fresh_context():
                at_cut = self.shallow(input_ids[pending.fresh], positions[pending.fresh])
            assert isinstance(at_cut, IntermediateTensors)
            for name, states in at_cut.tensors.items():
                joined[name].index_copy_(0, pending.fresh, states)
        final = self.deep(None, positions, IntermediateTensors(joined))
        assert isinstance(final, torch.Tensor)
        return final

    def timed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> dict[str, float]:
        """Run a drafting and a plain step over [n] tokens in their forward context; return ``StepTimes``' parts.

        Args:
            input_ids: int32 [n].
            positions: int64 [n].
        """
        times = [self._now(input_ids)]
        at_cut = self.shallow(input_ids, positions)
        times.append(self._now(input_ids))
        assert isinstance(at_cut, IntermediateTensors)
        hidden = residual_stream(at_cut)
        logits = self._head.logits(self._head.features(hidden, positions, hidden))
        entropy(logits).tolist()
        self._head.token_ids(logits.argmax(dim=-1)).tolist()
        times.append(self._now(input_ids))
        self._model.compute_logits(self.deep(None, positions, at_cut))
        times.append(self._now(input_ids))
        self._model.compute_logits(self._model(input_ids, positions))
        times.append(self._now(input_ids))
        parts = ("shallow", "head", "deep", "plain")
        return {part: after - before for part, (before, after) in zip(parts, pairwise(times), strict=True)}

    @staticmethod
    def _now(like: torch.Tensor) -> float:
        if like.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()
