"""Drafting with the first segment and an exit head; free of model runners."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vllm_earlyexit.config import EarlyExitConfig
from vllm_earlyexit.engine.frontier import Frontier, Step
from vllm_earlyexit.engine.models import Segment
from vllm_earlyexit.engine.policy import Policy, build_policy
from vllm_earlyexit.heads.checkpoint import load_heads
from vllm_earlyexit.heads.modules import SharedHead

RunShallow = Callable[[Step], torch.Tensor]
"""Feeds a step's tokens through the layers below the cut, writing their KV; returns hidden states [n, hidden_size]."""


class ExitHead:
    """A head at its cut: hidden states to logits over the draft vocabulary.

    Args:
        model: The exit-headed vLLM model, which lends its final norm and lm_head.
        module: The trained part.
        draft_vocab: Token ids that can be drafted, int64 [draft_vocab_size]; None for all of them.
    """

    def __init__(self, model: Any, module: nn.Module, draft_vocab: torch.Tensor | None):
        weight = model.lm_head.weight
        self._model = model
        self._module = module.to(device=weight.device, dtype=model.lm_head.weight.dtype).requires_grad_(False)
        self._vocab = None if draft_vocab is None else draft_vocab.to(weight.device)
        self._rows = None if self._vocab is None else weight[self._vocab].contiguous()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [n, draft_vocab_size] for hidden states at the cut, [n, hidden_size]."""
        features = self._model.final_norm(self._module(hidden))
        if self._rows is None:
            return self._model.compute_logits(features)
        return F.linear(features, self._rows)

    def token_ids(self, choice: torch.Tensor) -> torch.Tensor:
        """Map indices into the draft vocabulary to token ids."""
        return choice if self._vocab is None else self._vocab[choice]


class SelfExitDrafter:
    """Drafts tokens for a batch of sequences, each until its policy or its limit says stop.

    Args:
        model: The loaded exit-headed vLLM model.
        config: The resolved setting.
    """

    def __init__(self, model: Any, config: EarlyExitConfig):
        self.shallow: Segment = model.segments([config.exit_layer])[0]
        self._policy: Policy = build_policy(config)
        if config.heads is None:
            self._head = ExitHead(model, SharedHead(), None)
        else:
            heads = load_heads(Path(config.heads))
            self._head = ExitHead(model, heads.modules[config.exit_layer], heads.draft_vocab)

    def draft(self, frontier: Frontier, run_shallow: RunShallow) -> list[list[int]]:
        """Draft until every sequence has stopped; return the drafted tokens of each."""
        while (step := frontier.step) is not None:
            logits = self._head.logits(run_shallow(step))
            frontier.advance(self._head.token_ids(logits.argmax(dim=-1)), self._policy.keep(logits))
        return frontier.drafts()
