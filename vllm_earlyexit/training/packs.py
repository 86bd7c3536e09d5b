"""Records as training and measuring read them: packs of consecutive windows, trained on or held out by document."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.training.shards import Batch, Shard, concatenate, is_held_out, key_of, read_config, shards


class Records:
    """Records folders of one model, opened for reading together.

    Args:
        folders: The folders; damaged and foreign shards in them are skipped.
        report: Is told about each skipped shard.

    Raises:
        EarlyExitError: one is not a records folder, they do not fit together, or one has no usable shard.
    """

    def __init__(self, folders: Sequence[Path], report: Callable[[str], None] = lambda _: None):
        self.config = read_config(folders[0])
        self.shards: list[Shard] = []
        for folder in folders:
            if read_config(folder) != self.config:
                raise EarlyExitError(f"{folder} and {folders[0]} hold records of different models, cuts or top_k")
            found = list(shards(folder, self.config))
            for error in found:
                if isinstance(error, EarlyExitError):
                    report(f"skipped: {error}")
            usable = [shard for shard in found if isinstance(shard, Shard)]
            if not usable:
                raise EarlyExitError(f"{folder} has no usable shard; run 'vllm-earlyexit collect' first")
            self.shards += usable

    @property
    def tokens(self) -> int:
        """Recorded tokens, prompts included."""
        return sum(len(shard.scored) for shard in self.shards)

    @property
    def content(self) -> int:
        """A key of what is recorded: which windows, in which order."""
        return key_of(b"".join(shard.windows.numpy().tobytes() for shard in self.shards))

    def packs(self, tokens: int, layers: tuple[int, ...], held_out: float, which: bool) -> "Packs":
        """Return the documents that are held out (``which``) or trained on, in packs of at most ``tokens`` tokens.

        Args:
            tokens: Size of a pack; a single longer window is a pack of its own.
            layers: Hidden states to read.
            held_out: Share of the documents that is held out.
            which: True for those, False for the others.
        """
        index: list[tuple[int, list[int]]] = []
        for number, shard in enumerate(self.shards):
            chosen = [n for n, key in enumerate(shard.windows[:, 0].tolist()) if is_held_out(key, held_out) == which]
            size = tokens + 1
            for n in chosen:
                length = int(shard.lengths[n])
                if size + length > tokens:
                    index.append((number, []))
                    size = 0
                index[-1][1].append(n)
                size += length
        return Packs(self, index, layers)

    def choices(self, held_out: float, which: bool) -> Iterator[torch.Tensor]:
        """Yield, shard by shard, the full model's first choice after each scored token, int64 [num_scored]."""
        for shard in self.shards:
            side = torch.tensor([is_held_out(key, held_out) == which for key in shard.windows[:, 0].tolist()])
            scored = side.repeat_interleave(shard.lengths)[shard.scored]
            yield shard.read(0, len(shard.lengths), layers=()).top_ids[:, 0].long()[scored]


class Packs(torch.utils.data.Dataset):
    """A dataset whose items are batches of whole windows; see ``Records.packs``."""

    def __init__(self, records: Records, index: list[tuple[int, list[int]]], layers: tuple[int, ...]):
        self._records, self._index, self._layers = records, index, layers

    def __len__(self) -> int:
        """Return the number of packs."""
        return len(self._index)

    def __getitem__(self, n: int) -> Batch:
        """Return one pack."""
        number, windows = self._index[n]
        shard = self._records.shards[number]
        return concatenate([shard.read(first, last, self._layers) for first, last in _runs(windows)])

    def scored_tokens(self) -> list[int]:
        """Return the number of scored tokens of each pack."""
        return [
            sum(self._records.shards[number].num_scored(window) for window in windows)
            for number, windows in self._index
        ]

    def limited(self, scored_tokens: int) -> "Packs":
        """Return the first packs with about ``scored_tokens`` scored tokens in all, spread over the folder."""
        sizes = self.scored_tokens()
        keep = min(1.0, scored_tokens / max(1, sum(sizes)))
        chosen = [item for n, item in enumerate(self._index) if int((n + 1) * keep) > int(n * keep)]
        return Packs(self._records, chosen or self._index[:1], self._layers)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield consecutive numbers as half-open ranges."""
    first = numbers[0]
    for here, there in zip(numbers, [*numbers[1:], -1], strict=True):
        if there != here + 1:
            yield first, here + 1
            first = there


def on_device(batch: Batch, device: str | torch.device) -> Batch:
    """Return a batch whose tensors lie on ``device``."""
    moved = {name: getattr(batch, name).to(device) for name in ("ids", "scored", "final", "top_ids", "top_p")}
    return replace(batch, **moved, hidden={layer: hidden.to(device) for layer, hidden in batch.hidden.items()})
