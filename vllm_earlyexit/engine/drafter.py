"""Drafting with the first segment and an exit head; free of model runners."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sequence import IntermediateTensors

from vllm_earlyexit.config import EarlyExitConfig
from vllm_earlyexit.engine.frontier import Frontier
from vllm_earlyexit.engine.head import CompiledExit, Head, SharedExit
from vllm_earlyexit.engine.models import Segment, residual_stream, run_segments
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
        cut: At which exit they stand, as the drafter numbers them.
    """

    at: torch.Tensor
    states: dict[str, torch.Tensor]
    fresh: torch.Tensor
    cut: int = 0


@dataclass
class Exit:
    """One exit that can be drafted from.

    Attributes:
        head: Asked for tokens.
        below: The segments up to the cut.
        above: The segments from there on.
    """

    head: Head
    below: Sequence[Segment]
    above: Sequence[Segment]


class SelfExitDrafter:
    """Drafts tokens for a batch of sequences, each until its policy or its limit says stop, and verifies them.

    Args:
        model: The loaded exit-headed vLLM model; its forward runs the drafter's segments from here on.
        config: The resolved setting.
        vllm_config: vLLM's.
    """

    def __init__(self, model: Any, config: EarlyExitConfig, vllm_config: VllmConfig):
        self._model = model
        segments = model.cut(config.exit_layers)
        if config.heads is None:
            heads: list[Head] = [SharedExit(model)]
            self.policy: Policy = build_policy(config, [])
        else:
            found = load_heads(Path(config.heads))
            layers = config.exit_layers
            heads = [
                CompiledExit(vllm_config, model, layer, found.modules[layer], found.draft_vocab) for layer in layers
            ]
            self.policy = build_policy(config, [found.config.exit(layer) for layer in layers])
        self.exits = [Exit(head, segments[: n + 1], segments[n + 1 :]) for n, head in enumerate(heads)]

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
        frontier.cut = self.policy.exit
        drafted_from = self.exits[frontier.cut]
        while (step := frontier.step) is not None:
            with kv_context(step.rows, step.positions):
                at_cut = run_segments(drafted_from.below, step.input_ids, step.positions)
                assert isinstance(at_cut, IntermediateTensors)
                asked = drafted_from.head(residual_stream(at_cut), step.positions, previous[step.rows])
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
        below, above = self.exits[pending.cut].below, self.exits[pending.cut].above
        joined = {
            name: states.new_empty(len(positions), *states.shape[1:]).index_copy_(0, pending.at, states)
            for name, states in pending.states.items()
        }
        if len(pending.fresh):
            with fresh_context():
                at_cut = run_segments(below, input_ids[pending.fresh], positions[pending.fresh])
            assert isinstance(at_cut, IntermediateTensors)
            for name, states in at_cut.tensors.items():
                joined[name].index_copy_(0, pending.fresh, states)
        final = run_segments(above, None, positions, IntermediateTensors(joined))
        assert isinstance(final, torch.Tensor)
        return final

    def timed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> list[float]:
        """Run every part of a step over [n] tokens in their forward context; return the seconds of ``PartTimes``.

        Args:
            input_ids: int32 [n].
            positions: int64 [n].
        """
        times = [self._now(input_ids)]
        state: IntermediateTensors | None = None
        for drafted_from in self.exits:
            at_cut = drafted_from.below[-1](input_ids, positions, state)
            times.append(self._now(input_ids))
            assert isinstance(at_cut, IntermediateTensors)
            state = at_cut
            hidden = residual_stream(state)
            asked = drafted_from.head(hidden, positions, hidden.clone())  # compiled for one tensor, it would stay so
            asked.entropy.tolist()
            asked.token_ids.tolist()
            times.append(self._now(input_ids))
        self._model.compute_logits(run_segments(self.exits[-1].above, None, positions, state))
        times.append(self._now(input_ids))
        self._model.compute_logits(self._model(input_ids, positions))
        times.append(self._now(input_ids))
        return [after - before for before, after in pairwise(times)]

    @staticmethod
    def _now(like: torch.Tensor) -> float:
        if like.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()
