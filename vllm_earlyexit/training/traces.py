"""What exit heads say along held-out text, next to what the full model says."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.progress import track

from vllm_earlyexit.heads.checkpoint import Heads
from vllm_earlyexit.heads.uncertainty import entropy
from vllm_earlyexit.training.classroom import Classroom
from vllm_earlyexit.training.packs import Packs, on_device


@dataclass(frozen=True)
class Trace:
    """One exit head at one draft position, along held-out text.

    Attributes:
        entropy: Of the head's distribution, nats, float32 [num_tokens].
        agrees: Whether head and full model choose the same token, bool [num_tokens].
        lengths: Length of each continuous stretch; they sum to num_tokens.
        top: The head's two largest probabilities, float32 [num_tokens, 2].
        features: What the head made of each token, float16 [num_tokens, hidden_size]; empty if not asked for.
        documents: Key of each stretch's document.
    """

    entropy: torch.Tensor
    agrees: torch.Tensor
    lengths: list[int]
    top: torch.Tensor
    features: torch.Tensor
    documents: list[int]

    @property
    def agreement(self) -> float:
        """Share of tokens on which head and full model choose the same, to four digits."""
        return round(self.agrees.double().mean().item(), 4)

    @property
    def token_documents(self) -> torch.Tensor:
        """Key of each token's document, int64 [num_tokens]."""
        return torch.tensor(self.documents).repeat_interleave(torch.tensor(self.lengths))


@torch.no_grad()
def observe(classroom: Classroom, heads: Heads, packs: Packs, steps: int) -> dict[int, list[Trace]]:
    """Run heads over packs; return for each exit layer a trace per draft position, features with the first one."""
    layers = list(heads.modules)
    seen: dict[int, list[list[tuple[torch.Tensor, ...]]]] = {layer: [[] for _ in range(steps)] for layer in layers}
    lengths: list[int] = []
    documents: list[int] = []
    numbers: Iterable[int] = track(range(len(packs)), description="measuring")
    for n in numbers:
        batch = on_device(packs[n], classroom.teacher.device)
        lengths += [int(part.sum()) for part in batch.scored.split(batch.lengths.tolist())]
        documents += batch.windows[:, 0].tolist()
        for layer, module in heads.modules.items():
            with classroom.teacher.autocast():
                said = list(classroom.every_logits(module, batch.hidden[layer], batch, steps))
            for step, (logits, features) in enumerate(said):
                top = logits.float().topk(2).values - logits.float().logsumexp(dim=-1, keepdim=True)
                kept = features.half() if step == 0 else features[:0].half()
                agrees = classroom.agrees(logits, batch)
                seen[layer][step].append((entropy(logits).cpu(), agrees.cpu(), top.exp().cpu(), kept.cpu()))
    return {
        layer: [
            Trace(entropies, agrees, lengths, top, features, documents)
            for entropies, agrees, top, features in (map(torch.cat, zip(*parts, strict=True)) for parts in steps_seen)
        ]
        for layer, steps_seen in seen.items()
    }
