"""Training records on disk: what the full model computed and said, token by token, in shards of bounded size.

A records folder holds ``records.json`` and any number of ``shard-*.safetensors``. A shard appears under its name only
when it is complete, so whatever has the name is either whole or damaged from outside.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import write_whole
from vllm_earlyexit.training.data import Window

CONFIG_FILE = "records.json"
HELD_OUT_BUCKETS = 1000


class RecordsConfig(BaseModel):
    """What all shards of a records folder have in common; shards of anything else are foreign.

    Attributes:
        base_model: Name of the model that was observed.
        fingerprint: Its fingerprint.
        exit_layers: Cuts whose hidden states are kept.
        num_layers: Layers of the model; hidden states after all but the last layer are kept as well.
        hidden_size: Of the model.
        vocab_size: Of the model.
        top_k: Number of target probabilities kept for each scored token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = "vllm-earlyexit-records-1"
    base_model: str
    fingerprint: str
    exit_layers: tuple[int, ...]
    num_layers: int
    hidden_size: int
    vocab_size: int
    top_k: int

    @property
    def layers(self) -> tuple[int, ...]:
        """Number of layers run before each kept hidden state: the cuts, then the input of the last layer."""
        return (*self.exit_layers, self.num_layers - 1)

    @property
    def bytes_per_token(self) -> int:
        """Size on disk of a scored token; unscored ones have no targets and take less."""
        return 2 * self.hidden_size * (len(self.layers) + 1) + 6 * self.top_k + 5


@dataclass(frozen=True)
class Batch:
    """Consecutive tokens of several windows, one window after the other.

    Attributes:
        windows: Key of each window's document and of the window itself, int64 [num_windows, 2].
        lengths: Tokens of each window, int64 [num_windows]; they sum to num_tokens.
        ids: int32 [num_tokens].
        scored: Whether what follows a token is learned, bool [num_tokens].
        hidden: Hidden states after so many layers, each [num_tokens, hidden_size].
        final: After the last layer and the final norm, [num_tokens, hidden_size].
        top_ids: Most probable next tokens of scored tokens, falling, int32 [num_scored, top_k].
        top_p: Their probabilities under the full model at temperature 1, float16 [num_scored, top_k].
    """

    windows: torch.Tensor
    lengths: torch.Tensor
    ids: torch.Tensor
    scored: torch.Tensor
    hidden: dict[int, torch.Tensor]
    final: torch.Tensor
    top_ids: torch.Tensor
    top_p: torch.Tensor


def concatenate(batches: list[Batch]) -> Batch:
    """Return several batches as one."""

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])

    return Batch(
        **{name: joined(name) for name in ("windows", "lengths", "ids", "scored", "final", "top_ids", "top_p")},
        hidden={layer: torch.cat([batch.hidden[layer] for batch in batches]) for layer in batches[0].hidden},
    )


def key_of(data: bytes) -> int:
    """Return a 63-bit key, the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def window_key(window: Window) -> tuple[int, int]:
    """Return the keys of a window's document and of the window."""
    tokens = torch.tensor(window.ids, dtype=torch.int32).numpy().tobytes()
    return key_of(window.document.encode()), key_of(window.document.encode() + b"\0" + tokens + bytes(window.scored))


def is_held_out(document: int, share: float) -> bool:
    """Say whether a document is never trained on; the same documents for every run, a larger share only adds some."""
    return document % HELD_OUT_BUCKETS < round(share * HELD_OUT_BUCKETS)


def open_records(folder: Path, config: RecordsConfig) -> None:
    """Make ``folder`` a records folder for ``config``, or check that it is one already.

    Raises:
        EarlyExitError: it holds records of another model, or with other cuts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_FILE
    if path.exists():
        found = read_config(folder)
        if found != config:
            changed = [name for name in RecordsConfig.model_fields if getattr(found, name) != getattr(config, name)]
            raise EarlyExitError(
                f"{folder} holds records of {found.base_model!r} with another {', '.join(changed)}; "
                "choose another folder"
            )
        return
    if any(folder.iterdir()):
        raise EarlyExitError(f"{folder} is not empty and has no {CONFIG_FILE}; choose a folder of its own for records")
    write_whole(path, (config.model_dump_json(indent=2) + "\n").encode())


def read_config(folder: Path) -> RecordsConfig:
    """Read records.json.

    Raises:
        EarlyExitError: there is none, or it is damaged.
    """
    try:
        return RecordsConfig.model_validate(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise EarlyExitError(
            f"there are no records in {str(folder)!r}; make them with 'vllm-earlyexit collect'"
        ) from None
    except (OSError, ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise EarlyExitError(
            f"{folder / CONFIG_FILE} is damaged ({reason}); collect again into a new folder"
        ) from error


def _shapes(config: RecordsConfig, windows: int, tokens: int, scored: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a shard and their shapes."""
    state, top = (tokens, config.hidden_size), (scored, config.top_k)
    return {
        "windows": (windows, 2),
        "lengths": (windows,),
        "ids": (tokens,),
        "scored": (tokens,),
        "final": state,
        "top_ids": top,
        "top_p": top,
        **{f"hidden.{layer}": state for layer in config.layers},
    }


def _tensor(batch: Batch, name: str) -> torch.Tensor:
    field, _, layer = name.partition(".")
    tensor = batch.hidden[int(layer)] if layer else getattr(batch, field)
    return tensor.to(torch.bfloat16) if layer or field == "final" else tensor


def write_shard(folder: Path, number: int, config: RecordsConfig, batch: Batch) -> Path:
    """Write one shard.

    Raises:
        EarlyExitError: the disk is full; complete shards stay, and collecting can go on once there is room.
    """
    path = folder / f"shard-{number:05d}.safetensors"
    partial = path.with_suffix(".partial")
    tensors = {name: _tensor(batch, name) for name in _shapes(config, 0, 0, 0)}
    try:
        save_file(tensors, partial, metadata={"config": config.model_dump_json()})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else str(error)
        raise EarlyExitError(
            f"cannot write {path}: {reason}; what is complete is kept, run the same command again to go on"
        ) from error
    return path


class Shard:
    """A shard whose index is in memory and whose tensors are read from disk as they are asked for.

    Raises:
        EarlyExitError: it is damaged or foreign; the message names it.
    """

    def __init__(self, path: Path, config: RecordsConfig):
        self.path, self._config = path, config
        try:
            self._file = safe_open(path, framework="pt")
            found = (self._file.metadata() or {}).get("config", "{}")
            if json.loads(found) != json.loads(config.model_dump_json()):
                raise EarlyExitError(f"{path} is foreign: it was not made with this folder's {CONFIG_FILE}")
            self.windows: torch.Tensor = self._file.get_tensor("windows")
            self.lengths: torch.Tensor = self._file.get_tensor("lengths")
            self.scored: torch.Tensor = self._file.get_tensor("scored")
            sizes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise EarlyExitError(f"{path} is damaged ({error})") from error
        tokens, targets = int(self.lengths.sum()), int(self.scored.sum())
        expected = _shapes(config, len(self.lengths), tokens, targets)
        if sizes != expected:
            wrong = sorted(name for name in sizes.keys() | expected.keys() if sizes.get(name) != expected.get(name))
            raise EarlyExitError(f"{path} is damaged ({', '.join(wrong)} missing or of the wrong size)")
        self._starts = [0, *self.lengths.cumsum(0).tolist()]
        self._targets = [0, *self.scored.cumsum(0).tolist()]

    def num_scored(self, window: int) -> int:
        """Return the number of scored tokens of one window."""
        return self._targets[self._starts[window + 1]] - self._targets[self._starts[window]]

    def read(self, first: int, last: int, layers: tuple[int, ...] | None = None) -> Batch:
        """Return windows ``first`` up to, not including, ``last``; hidden states of ``layers`` only, by default all."""
        start, end = self._starts[first], self._starts[last]
        target, targets = self._targets[start], self._targets[end]

        def rows(name: str, low: int, high: int) -> torch.Tensor:
            return self._file.get_slice(name)[low:high]

        return Batch(
            windows=self.windows[first:last],
            lengths=self.lengths[first:last],
            ids=rows("ids", start, end),
            scored=self.scored[start:end],
            hidden={
                layer: rows(f"hidden.{layer}", start, end)
                for layer in (self._config.layers if layers is None else layers)
            },
            final=rows("final", start, end),
            top_ids=rows("top_ids", target, targets),
            top_p=rows("top_p", target, targets),
        )


def shards(folder: Path, config: RecordsConfig) -> Iterator[Shard | EarlyExitError]:
    """Yield every shard of a records folder in order, and for each that cannot be used the error that names it."""
    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            yield Shard(path, config)
        except EarlyExitError as error:
            yield error
