"""From text records to token windows with a loss mask, batched by size."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_earlyexit.training.records import read_records


@dataclass(frozen=True)
class Window:
    """A stretch of one record.

    Attributes:
        ids: Token ids.
        scored: For each token, whether what follows it is learned: all of a text, only the answers of a conversation.
    """

    ids: list[int]
    scored: list[bool]


def tokenize(record: dict[str, Any], tokenizer: Any) -> Window:
    """Return one record as a single window; conversations go through the tokenizer's chat template."""
    if "text" in record:
        text = tokenizer(record["text"], add_special_tokens=False)["input_ids"]
        return Window(text, [True] * len(text))
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(record["turns"])]
    ids: list[int] = []
    scored: list[bool] = []
    for n, message in enumerate(messages):
        answer = message["role"] == "assistant"
        upto = tokenizer.apply_chat_template(
            messages[: n + 1], add_generation_prompt=not answer, tokenize=True, return_dict=False
        )
        new = upto[len(ids) :]
        if answer and scored:
            scored[-1] = True  # the answer's first token is predicted at the last token of the prompt
        ids, scored = upto, scored + [answer] * len(new)
    return Window(ids, scored)


def windows(paths: Iterable[Path], tokenizer: Any, length: int) -> list[Window]:
    """Return every record of ``paths`` cut into windows of at most ``length`` tokens that have something to learn."""
    cut = []
    for path in paths:
        for record in read_records(path):
            whole = tokenize(record, tokenizer)
            for start in range(0, len(whole.ids), length):
                part = Window(whole.ids[start : start + length], whole.scored[start : start + length])
                if sum(part.scored) >= 8:
                    cut.append(part)
    return cut


def split(items: list[Window], held_out: float, seed: int) -> tuple[list[Window], list[Window]]:
    """Shuffle and split into (training, held-out) windows."""
    items = items[:]
    random.Random(seed).shuffle(items)
    first = max(1, round(held_out * len(items)))
    return items[first:], items[:first]


def batches(items: list[Window], tokens: int, seed: int) -> Iterator[list[Window]]:
    """Yield batches of similar lengths with at most ``tokens`` padded tokens each, in random order."""
    order = sorted(items, key=lambda w: len(w.ids))
    grouped: list[list[Window]] = [[]]
    for window in order:
        if grouped[-1] and (len(grouped[-1]) + 1) * len(window.ids) > tokens:
            grouped.append([])
        grouped[-1].append(window)
    random.Random(seed).shuffle(grouped)
    yield from (group for group in grouped if group)


def pad(batch: list[Window], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (ids, attention mask, scored), each [batch, longest], padded on the right."""
    longest = max(len(w.ids) for w in batch)
    ids = torch.tensor([w.ids + [pad_id] * (longest - len(w.ids)) for w in batch])
    mask = torch.tensor([[1] * len(w.ids) + [0] * (longest - len(w.ids)) for w in batch])
    scored = torch.tensor([w.scored + [False] * (longest - len(w.ids)) for w in batch])
    return ids, mask, scored
