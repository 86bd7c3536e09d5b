"""Drafting with the first segment and an exit head; free of model runners."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sequence import IntermediateTensors

from vllm_earlyexit.config import EarlyExitConfig
from vllm_earlyexit.engine.cost import PARTS
from vllm_earlyexit.engine.frontier import Frontier
from vllm_earlyexit.engine.head import Head, SharedExit, trained_exit
from vllm_earlyexit.engine.models import residual_stream
from vllm_earlyexit.engine.policy import Policy, build_policy
from vllm_earlyexit.heads.checkpoint import load_heads

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
            self.head: Head = SharedExit(model)
            self.policy: Policy = build_policy(config, None)
        else:
            heads = load_heads(Path(config.heads))
            self.head = trained_exit(vllm_config, model, heads.modules[config.exit_layer], heads.draft_vocab)
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
                asked = self.head(residual_stream(at_cut), step.positions, previous[step.rows])
            frontier.keep(at_cut.tensors)
            previous[step.rows] = asked.features
            decision = self.policy.decide(step.rows, asked.entropy)
            frontier.advance(asked.token_ids, decision.keep)
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
        asked = self.head(hidden, positions, hidden.clone())  # compiling takes one tensor for two as one for ever
        asked.entropy.tolist()
        asked.token_ids.tolist()
        times.append(self._now(input_ids))
        self._model.compute_logits(self.deep(None, positions, at_cut))
        times.append(self._now(input_ids))
        self._model.compute_logits(self._model(input_ids, positions))
        times.append(self._now(input_ids))
        return {part: after - before for part, (before, after) in zip(PARTS, pairwise(times), strict=True)}

    @staticmethod
    def _now(like: torch.Tensor) -> float:
        if like.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()
