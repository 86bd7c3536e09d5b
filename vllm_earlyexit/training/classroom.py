"""Heads in training or under test beside the model they learn from, and how often the two agree."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from vllm_earlyexit.heads.modules import HeadKind
from vllm_earlyexit.training.packs import Packs, on_device
from vllm_earlyexit.training.shards import Batch
from vllm_earlyexit.training.teacher import Teacher, draft_steps

MEASURED_STEPS = 4
"""Draft positions at which agreement is measured."""


def frequent_tokens(
    choices: Iterator[torch.Tensor], size: int, vocab_size: int, known: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Return the ``size`` tokens that the full model chooses most often, ascending, int64 [size].

    Tokens that it never chooses fill up the rest, known ones before others, lowest first. None for all tokens, which it
    is if ``size`` is 0.

    Args:
        choices: The full model's first choices, int64 [n] each.
        size: How many tokens.
        vocab_size: Of the model.
        known: Tokens that were frequent before, int64 [m]; None for none.
    """
    if size <= 0 or size >= vocab_size:
        return None
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for chosen in choices:
        counts += chosen.bincount(minlength=vocab_size)
    if known is not None:
        counts *= 2  # so that one more decides between equals
        counts[known] += 1
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def draft_index(draft_vocab: torch.Tensor | None, vocab_size: int) -> torch.Tensor:
    """Return the inverse of a draft vocabulary: for each token its index, or -1; int64 [vocab_size]."""
    if draft_vocab is None:
        return torch.arange(vocab_size)
    index = torch.full((vocab_size,), -1)
    index[draft_vocab] = torch.arange(len(draft_vocab))
    return index


class Students(nn.ModuleDict):
    """The heads in training, by the name ``KIND-LAYER``."""

    @staticmethod
    def key(kind: HeadKind, exit_layer: int) -> str:
        """Return a head's name."""
        return f"{kind}-{exit_layer}"

    def at(self) -> Iterator[tuple[str, int, nn.Module]]:
        """Yield name, exit layer and module of every head."""
        for name, module in self.items():
            yield name, int(name.rpartition("-")[2]), module


@dataclass(frozen=True)
class Classroom:
    """What training and measuring heads need besides the heads.

    Attributes:
        teacher: The base model.
        draft_vocab: Token ids that can be drafted, int64 [draft_vocab_size], or None for all.
        rows: lm_head's rows for them, [draft_vocab_size, hidden_size].
        index: Token id to draft index, int64 [vocab_size].
        deep_keys: See ``TrainingOptions``.
    """

    teacher: Teacher
    draft_vocab: torch.Tensor | None
    rows: torch.Tensor
    index: torch.Tensor
    deep_keys: bool = True

    @staticmethod
    def of(teacher: Teacher, draft_vocab: torch.Tensor | None, deep_keys: bool = True) -> "Classroom":
        """Return the classroom for a draft vocabulary."""
        index = draft_index(draft_vocab, teacher.vocab_size).to(teacher.device)
        return Classroom(teacher, draft_vocab, teacher.rows(draft_vocab), index, deep_keys)

    def features(self, module: nn.Module, hidden: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        """Return a head's features after the final norm at draft step ``step``, [num_tokens, hidden_size].

        Args:
            module: The head.
            hidden: Hidden states at its cut, [num_tokens, hidden_size].
            batch: Where they are from.
            step: Number of pending tokens before each token.
        """
        return draft_steps(self.teacher, module, hidden, batch, step, self.deep_keys)[-1]

    def logits(self, features: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return logits on the scored tokens, [num_scored, draft_vocab_size], for ``features``."""
        return self.teacher.unembed(features[batch.scored], self.rows)

    def every_logits(
        self, module: nn.Module, hidden: torch.Tensor, batch: Batch, steps: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield logits and features on the scored tokens at draft steps 0 to ``steps - 1``."""
        for features in draft_steps(self.teacher, module, hidden, batch, steps - 1, self.deep_keys):
            yield self.logits(features, batch), features[batch.scored]

    def agrees(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return whether head and full model choose alike, bool [num_scored]."""
        return logits.argmax(dim=-1) == self.index[batch.top_ids[:, 0].long()]


@torch.no_grad()
def agreement(
    classroom: Classroom, students: Students, packs: Packs, steps: int = MEASURED_STEPS
) -> dict[str, list[float]]:
    """Return for each head the share of scored tokens on which it chooses as the full model, per draft position."""
    hits = {name: [0] * steps for name in students}
    total = 0
    for n in range(len(packs)):
        batch = on_device(packs[n], classroom.teacher.device)
        total += len(batch.top_ids)
        with classroom.teacher.autocast():
            for name, layer, module in students.at():
                for step, (logits, _) in enumerate(classroom.every_logits(module, batch.hidden[layer], batch, steps)):
                    hits[name][step] += int(classroom.agrees(logits, batch).sum())
    return {name: [round(count / total, 4) for count in counts] for name, counts in hits.items()}
