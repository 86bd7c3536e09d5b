"""The heads checkpoint: a folder with config.json and model.safetensors. Loading it never unpickles anything."""

import json
import math
import os
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.modules import HeadKind, build_head

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SCALE = ".scale"
LossName = Literal["kl", "tv", "ce"]
SignalName = Literal["entropy", "max_probability", "margin", "probe"]
Storage = Literal["float32", "bfloat16", "int8"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Threshold(_Part):
    """The largest entropy whose accepted set still agrees with the full model at least at rate ``accuracy``."""

    accuracy: Annotated[float, Field(gt=0, lt=1)]
    entropy: Annotated[float, Field(ge=0, description="nats; draft while the head's entropy is at most this")]
    coverage: Annotated[float, Field(ge=0, le=1, description="share of held-out tokens at or below the entropy")]
    measured: Annotated[
        float | None,
        Field(ge=0, le=1, description="accuracy on documents that such a threshold was not fitted on"),
    ] = None


class PositionCalibration(_Part):
    """One draft position: how often the head agrees with the full model, and the map from entropy to that."""

    agreement: Annotated[float, Field(ge=0, le=1, description="share on which head and full model choose alike")]
    entropy: Annotated[tuple[float, ...], Field(description="nats, rising")]
    probability: Annotated[tuple[float, ...], Field(description="of being accepted at these entropies, falling")]
    expected_calibration_error: Annotated[float, Field(ge=0, le=1, description="of the map, on documents not fitted")]
    deeper: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1)], ...],
        Field(
            description="how often the next exit's head agrees where this one has these entropies; empty at the last"
        ),
    ] = ()

    def threshold(self, accuracy: float, doubt: float = 0.0) -> float:
        """Return the nats up to which tokens agree with the full model at least at rate ``accuracy``; -inf if none do.

        Knots stand for equally many tokens each, so the rate up to a knot is the mean of the probabilities there.

        Args:
            accuracy: The rate.
            doubt: Error rate that there is at least at the last knot, and proportionately less at surer ones. Of a few
                thousand tokens that were calibrated on none may have erred where a few in a thousand do.
        """
        knots = len(self.probability)
        probability = [min(p, 1 - doubt * (n + 0.5) / knots) for n, p in enumerate(self.probability)]
        rates = [total / count for count, total in enumerate(accumulate(probability), start=1)]
        if rates[0] < accuracy:
            return -math.inf
        reached = sum(rate >= accuracy for rate in rates)
        if reached == len(rates):
            return self.entropy[-1]
        share = (rates[reached - 1] - accuracy) / (rates[reached - 1] - rates[reached])
        return self.entropy[reached - 1] + share * (self.entropy[reached] - self.entropy[reached - 1])

    @model_validator(mode="after")
    def _monotone(self) -> "PositionCalibration":
        if len(self.entropy) != len(self.probability) or not self.entropy:
            raise ValueError("entropy and probability must be of the same length, at least 1")
        if list(self.entropy) != sorted(self.entropy) or list(self.probability) != sorted(self.probability)[::-1]:
            raise ValueError("entropy must rise and probability fall")
        if len(self.deeper) not in (0, len(self.entropy)):
            raise ValueError("deeper must be of the same length as entropy, or empty")
        return self


class Signal(_Part):
    """How well a measure of uncertainty tells right from wrong drafts."""

    name: SignalName
    risk_coverage_area: Annotated[
        float, Field(ge=0, le=1, description="mean error rate over coverages; less is better")
    ]
    low: Annotated[float, Field(description="2.5 % of bootstrap samples over documents lie below")]
    high: Annotated[float, Field(description="2.5 % lie above")]


class Calibration(_Part):
    """What held-out tokens say about one exit head."""

    tokens: Annotated[int, Field(gt=0, description="held-out tokens measured")]
    agreement: Annotated[float, Field(ge=0, le=1, description="at the first draft position")]
    thresholds: tuple[Threshold, ...]
    draft_cost: Annotated[
        float | None, Field(gt=0, description="weights that a draft step reads, as a share of a full forward pass")
    ] = None
    positions: Annotated[tuple[PositionCalibration, ...], Field(description="from the first draft position on")] = ()
    signals: tuple[Signal, ...] = ()

    def threshold(self, accuracy: float) -> float:
        """Return the entropy threshold for ``accuracy``, or for the next stricter one that was calibrated."""
        stricter = [t for t in self.thresholds if t.accuracy >= accuracy - 1e-9]
        if not stricter:
            known = ", ".join(f"{t.accuracy:g}" for t in self.thresholds)
            raise EarlyExitError(
                f"self-exit: no entropy threshold reaches target_accuracy {accuracy:g} for these heads; "
                f"choose one of {known}"
            )
        return min(stricter, key=lambda t: t.accuracy).entropy


class ExitHeadConfig(_Part):
    """One exit: where it is, what its head is, how sure it may be trusted to be."""

    exit_layer: Annotated[int, Field(gt=0, description="layers run before the exit")]
    kind: HeadKind
    intermediate_size: Annotated[int, Field(ge=0, description="width of the MLPs of mlp, tail and recurrent heads")] = 0
    query_size: Annotated[int, Field(ge=0, description="query heads times head size, for tail and recurrent heads")] = 0
    calibration: Calibration | None = None


class Recommendation(_Part):
    """The setting with the highest predicted speed, found by replaying drafts on held-out text."""

    exit_layer: int
    num_speculative_tokens: int
    target_accuracy: float
    predicted_acceptance_length: float
    predicted_speedup: Annotated[float, Field(description="by the layer-count cost model, not measured")]


class HeadsConfig(_Part):
    """config.json of a heads checkpoint."""

    format: Literal["vllm-earlyexit-heads-1"] = "vllm-earlyexit-heads-1"
    base_model: Annotated[str, Field(description="name or Hub id of the model the heads were trained on")]
    base_revision: str | None = None
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    hidden_size: Annotated[int, Field(gt=0)]
    num_layers: Annotated[int, Field(gt=1)]
    vocab_size: Annotated[int, Field(gt=1)]
    draft_vocab_size: Annotated[int, Field(gt=1, description="equal to vocab_size: the full vocabulary is drafted")]
    exits: Annotated[tuple[ExitHeadConfig, ...], Field(min_length=1)]
    recommended: Recommendation | None = None
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "HeadsConfig":
        layers = [e.exit_layer for e in self.exits]
        if layers != sorted(set(layers)) or layers[-1] >= self.num_layers:
            raise ValueError(f"exits must rise and stay below {self.num_layers} layers, got {layers}")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError("draft_vocab_size exceeds vocab_size")
        if self.recommended is not None and self.recommended.exit_layer not in layers:
            raise ValueError("the recommended exit is not among the exits")
        return self

    def exit(self, exit_layer: int) -> ExitHeadConfig:
        """Return the exit at ``exit_layer``.

        Raises:
            EarlyExitError: these heads have no such exit.
        """
        for candidate in self.exits:
            if candidate.exit_layer == exit_layer:
                return candidate
        known = ", ".join(str(e.exit_layer) for e in self.exits)
        raise EarlyExitError(
            f"self-exit: these heads have no exit after layer {exit_layer}; set exit_layer to one of {known}, "
            "or train a head there"
        )


class Heads:
    """A heads checkpoint in memory: config, one module per exit layer, and the draft vocabulary.

    Attributes:
        config: The checkpoint's config.
        modules: exit layer to head module, float32 or as stored.
        draft_vocab: Token ids that can be drafted, int64 [draft_vocab_size], or None for the full vocabulary.
    """

    def __init__(self, config: HeadsConfig, modules: dict[int, nn.Module], draft_vocab: torch.Tensor | None):
        self.config, self.modules, self.draft_vocab = config, modules, draft_vocab

    def to(self, device: str) -> None:
        """Move the modules to ``device``."""
        for module in self.modules.values():
            module.to(device).requires_grad_(False)

    def save(self, folder: Path, storage: Storage = "bfloat16") -> None:
        """Write the checkpoint to ``folder``, config last; what was there before is only replaced by whole files.

        Args:
            folder: Made if it is not there.
            storage: How weights are stored. ``int8`` keeps matrices as one byte an entry and a scale per row.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for layer, module in self.modules.items():
            for name, value in module.state_dict().items():
                tensors |= _stored(f"exits.{layer}.{name}", value.detach().cpu(), storage)
        if self.draft_vocab is not None:
            tensors["draft_vocab"] = self.draft_vocab.to("cpu", torch.int32)
        partial = folder / f"{WEIGHTS_FILE}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        os.replace(partial, folder / WEIGHTS_FILE)
        write_config(self.config, folder)


def as_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix rounded to one byte an entry, int8 [n, m], and the scale of each row, float32 [n, 1]."""
    scale = (weight.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12)
    return (weight / scale).round().to(torch.int8), scale


def _stored(name: str, value: torch.Tensor, storage: Storage) -> dict[str, torch.Tensor]:
    if storage == "int8" and value.dim() == 2:
        whole, scale = as_int8(value)
        return {name: whole, name + SCALE: scale}
    dtype = torch.bfloat16 if storage == "int8" else getattr(torch, storage)
    return {name: value.to(dtype).contiguous()}


def _loaded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return stored weights as float32, in memory of their own: a file that changes changes nothing."""
    return {
        name: value.float() * tensors[name + SCALE] if name + SCALE in tensors else value.to(torch.float32, copy=True)
        for name, value in tensors.items()
        if not name.endswith(SCALE)
    }


def write_config(config: HeadsConfig, folder: Path) -> None:
    """Write config.json alone, as calibration does; it is replaced as a whole."""
    write_whole(folder / CONFIG_FILE, (config.model_dump_json(indent=2, exclude_none=True) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write ``path`` so that it has either its old content or all of ``data``."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def read_config(folder: Path) -> HeadsConfig:
    """Read and check a checkpoint's config.json.

    Raises:
        EarlyExitError: the folder or the file is missing or is not a heads checkpoint.
    """
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise EarlyExitError(
            f"self-exit: there is no heads folder {str(folder)!r}; check the path, or train with 'vllm-earlyexit train'"
        )
    try:
        return HeadsConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise EarlyExitError(f"self-exit: {folder} has no {CONFIG_FILE}, so it is not a heads checkpoint") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or CONFIG_FILE
        raise EarlyExitError(
            f"self-exit: {path} is not a valid heads config ({where}: {first['msg']}); train the heads again"
        ) from error
    except (OSError, ValueError) as error:
        raise EarlyExitError(f"self-exit: {path} cannot be read ({error}); copy or train the heads again") from error


def load_heads(folder: Path) -> Heads:
    """Read a heads checkpoint, checking every tensor's presence, shape and values; memory is taken for the file alone.

    Raises:
        EarlyExitError: a file is missing, damaged, or does not fit the config.
    """
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise EarlyExitError(f"self-exit: {folder} has no {WEIGHTS_FILE}; copy the whole heads folder") from None
    except (OSError, SafetensorError) as error:
        raise EarlyExitError(f"self-exit: {path} is damaged ({error}); copy or train the heads again") from error
    draft_vocab = tensors.pop("draft_vocab", None)
    modules = {}
    for exit_config in config.exits:
        sizes = (config.hidden_size, exit_config.intermediate_size, exit_config.query_size)
        with torch.device("meta"):
            module = build_head(exit_config.kind, *sizes)
        prefix = f"exits.{exit_config.exit_layer}."
        state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        try:
            module.load_state_dict(_loaded(state), assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise EarlyExitError(
                f"self-exit: {path} does not fit its config ({reason}); copy or train the heads again"
            ) from error
        if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
            raise EarlyExitError(f"self-exit: {path} has weights that are not finite; copy or train the heads again")
        modules[exit_config.exit_layer] = module
    expected = None if config.draft_vocab_size == config.vocab_size else (config.draft_vocab_size,)
    found = None if draft_vocab is None else tuple(draft_vocab.shape)
    if expected != found:
        raise EarlyExitError(f"self-exit: {path} has a draft vocabulary of shape {found}, expected {expected}")
    if draft_vocab is not None:
        draft_vocab = draft_vocab.long()
        if int(draft_vocab.min()) < 0 or int(draft_vocab.max()) >= config.vocab_size:
            raise EarlyExitError(f"self-exit: {path} drafts tokens outside the model's vocabulary")
    return Heads(config, modules, draft_vocab)
