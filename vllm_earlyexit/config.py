"""What users ask for, checked once, and what the engine gets."""

import hashlib
import json
import logging
import os
from collections import UserDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from vllm_earlyexit.assets import shipped_heads
from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import ExitHeadConfig, HeadsConfig, load_heads, read_config
from vllm_earlyexit.heads.fingerprint import fingerprint, model_folder, text_config
from vllm_earlyexit.plugin import METHOD

logger = logging.getLogger("vllm.earlyexit")

CONFIG_KEY = "self_exit"  # in VllmConfig.additional_config
SPELLING = "[self-exit]"
HEADS_KEY = "self_exit_heads"  # in a model's config.json, and the folder beside it
PolicyName = Literal["auto", "entropy", "fixed"]
FillIn = Literal["resume", "propagate"]
DEFAULT_ACCURACY = 0.9
DEFAULT_DRAFT_LENGTH, AUTO_DRAFT_LENGTH = 4, 16
MAX_DRAFT_LENGTH = 64


class Knobs(BaseModel):
    """Everything a user may set in ``speculative_config``, beside ``method``."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Annotated[str | None, Field(description="heads: a folder or a Hub id")] = None
    exit_layer: Annotated[
        PositiveInt | tuple[PositiveInt, ...] | None,
        Field(
            description="layers to run before drafting from the exit head; several, for policies 'auto' and 'entropy': "
            "a token that is unsure at one is taken on to the next"
        ),
    ] = None
    num_speculative_tokens: Annotated[int | None, Field(gt=0, le=MAX_DRAFT_LENGTH, description="longest draft")] = None
    policy: Annotated[
        PolicyName | None,
        Field(
            description="'auto' drafts while that is expected to raise the batch's tokens per second; "
            "'entropy' stops at the first unsure token; 'fixed' always drafts the longest draft"
        ),
    ] = None
    target_accuracy: Annotated[
        float | None, Field(gt=0, lt=1, description="entropy policy: calibrated accuracy of what is drafted")
    ] = None
    prompt_lookup: Annotated[
        bool | None,
        Field(description="auto policy: where a sequence repeats itself, draft what followed before; true by default"),
    ] = None
    draft_sample_method: Annotated[
        Literal["greedy", "probabilistic"],
        Field(
            description="what requests that sample draft: a head's first choice, or what it draws with the random "
            "numbers that verification will use (on Model Runner V2; V1 drafts first choices)"
        ),
    ] = "probabilistic"
    mode: Annotated[
        Literal["lossless", "early_exit"],
        Field(description="for requests that do not ask; 'early_exit' is lossy: what a head is sure of is final"),
    ] = "lossless"
    early_exit_accuracy: Annotated[
        float | None,
        Field(gt=0, lt=1, description="mode 'early_exit': rate at which early tokens shall agree with the full model"),
    ] = None
    lowest_accuracy: Annotated[
        float | None,
        Field(
            gt=0, lt=1, description="lowest such rate that requests may ask for; in mode lossless none may by default"
        ),
    ] = None
    fill_in: Annotated[
        FillIn,
        Field(
            description="KV of layers that early tokens skipped: 'resume' computes it when a later token goes deep, "
            "'propagate' projects the hidden state at the exit"
        ),
    ] = "resume"
    check_rate: Annotated[
        float,
        Field(ge=0, le=1, description="'propagate': share of sequences whose early tokens are checked, each step"),
    ] = 0.05
    head: Annotated[
        Literal["trained", "shared"],
        Field(description="'shared' is LayerSkip's: final norm and lm_head, no heads needed"),
    ] = "trained"


@dataclass(frozen=True)
class EarlyExitConfig:
    """One resolved setting, as the engine gets it.

    Attributes:
        heads: Folder of the heads checkpoint; None for the shared head.
        exit_layers: Layers run before each exit that may be drafted from, rising.
        num_speculative_tokens: Longest draft.
        policy: ``auto``, ``entropy`` or ``fixed``.
        entropy_thresholds: Nats, one for each exit; the entropy policy drafts a token whose entropy is at most this.
        prompt_lookup: Whether the auto policy may copy from a sequence's own text instead of drafting.
        head_shape: What of the heads shapes their compiled graphs.
        counters: Folder in which workers count what vLLM does not; see ``engine.counters``.
        early_exit_accuracy: Rate at which early tokens shall agree with the full model, for requests that do not ask;
            None if these are lossless.
        lowest_accuracy: Lowest such rate that requests may ask for; None if no request may exit early.
        fill_in: How the KV of skipped layers comes about.
        check_rate: Share of sequences that are checked where nothing else does.
        draws: Whether requests that sample draw what they draft, instead of taking a head's first choice.
    """

    heads: str | None
    exit_layers: tuple[int, ...]
    num_speculative_tokens: int
    policy: PolicyName
    entropy_thresholds: tuple[float, ...] = ()
    prompt_lookup: bool = False
    head_shape: str = "shared"
    counters: str = ""
    early_exit_accuracy: float | None = None
    lowest_accuracy: float | None = None
    fill_in: FillIn = "resume"
    check_rate: float = 0.0
    draws: bool = True

    @property
    def exits_early(self) -> bool:
        """Whether any request may exit early."""
        return self.lowest_accuracy is not None

    @classmethod
    def of(cls, vllm_config: Any) -> "EarlyExitConfig":
        """Return the setting that arrived in one of vLLM's processes."""
        return cls(**vllm_config.additional_config[CONFIG_KEY])

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready copy, as it travels to vLLM's processes."""
        return asdict(self)


class AdditionalConfig(UserDict[str, Any]):
    """vLLM's ``additional_config`` with our setting under ``CONFIG_KEY``.

    Of that setting only what shapes compiled graphs enters the key of vLLM's compilation cache, so that another policy
    or threshold does not compile the model anew.
    """

    def compute_hash(self) -> str:
        """Return the part of vLLM's cache key that stands for this config."""
        ours = self.data[CONFIG_KEY]
        factors = self.data | {CONFIG_KEY: [ours["exit_layers"], ours["head_shape"]]}
        return hashlib.sha256(json.dumps(factors, sort_keys=True).encode()).hexdigest()


def knobs_from(
    config: dict[str, Any] | None, method: str | None, model: str | None, tokens: int | None
) -> Knobs | None:
    """Return the knobs if self-exit is asked for, None if something else is.

    Args:
        config: ``speculative_config``, from Python or ``--speculative-config``.
        method: ``--spec-method``.
        model: ``--spec-model`` or ``--speculative-model``.
        tokens: ``--spec-tokens``.

    Raises:
        EarlyExitError: a knob is unknown, out of range, or given twice.
    """
    asked = {key.replace("-", "_"): value for key, value in (config or {}).items()}
    flags = {"method": method, "model": model, "num_speculative_tokens": tokens}
    flags = {key: value for key, value in flags.items() if value is not None}
    twice = [key for key, value in flags.items() if asked.get(key, value) != value]
    merged = asked | flags
    spelled = str(merged.get("model") or "").startswith(SPELLING)
    chosen = str(merged.pop("method", METHOD if spelled else None)).replace("-", "_")
    if not spelled and chosen != METHOD:
        return None
    if twice:
        key = twice[0]
        raise EarlyExitError(f"self-exit: {key} is given twice, as {asked[key]!r} and {flags[key]!r}; give it once")
    if chosen != METHOD:
        raise EarlyExitError(f"self-exit: model {SPELLING!r} and method {chosen!r} contradict each other; drop one")
    if spelled:
        merged["model"] = str(merged["model"]).removeprefix(SPELLING).removeprefix(":") or None
    try:
        return Knobs.model_validate({key: value for key, value in merged.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0]
        if first["type"] == "extra_forbidden":
            known = ", ".join(["method", *Knobs.model_fields])
            raise EarlyExitError(f"self-exit: there is no knob {name!r}; the knobs are {known}") from None
        raise EarlyExitError(f"self-exit: {name}={first['input']!r} does not work: {first['msg']}") from None


def _find_heads(asked: str | None, folder: Path, model_print: str, cache: str | None) -> Path:
    """Return the folder of the heads to use, fetching them from the Hub if they are named by id."""
    named = asked or text_config(folder).get(HEADS_KEY)
    if named is not None and not isinstance(named, str):
        raise EarlyExitError(f"self-exit: {HEADS_KEY} in {folder / 'config.json'} must be a path or a Hub id")
    if named is None:
        beside = folder / HEADS_KEY
        found = beside if beside.is_dir() else shipped_heads(model_print)
        if found is None:
            raise EarlyExitError(
                f"self-exit: no exit heads come with this model; train them with 'vllm-earlyexit train {folder} …' "
                f"and name their folder, '{SPELLING}:HEADS'"
            )
        return found
    local = Path(named) if asked else folder / named
    if not asked and Path(os.path.normpath(named)).parts[:1] in (("..",), ("/",)):
        raise EarlyExitError(f"self-exit: {HEADS_KEY} in {folder / 'config.json'} leads out of the model's folder")
    if local.exists() or named.startswith((".", "/", "~")) or named.count("/") != 1:
        return local.expanduser()
    return model_folder(named, cache=cache)


def _check_belongs(heads: HeadsConfig, where: Path, model: str, model_print: str) -> None:
    if heads.fingerprint != model_print:
        raise EarlyExitError(
            f"self-exit: the heads in {where} were trained for {heads.base_model!r}, not for {model!r}; "
            f"name heads of this model or train them with 'vllm-earlyexit train'"
        )


def resolve(knobs: Knobs, model: str, revision: str | None = None, cache: str | None = None) -> EarlyExitConfig:
    """Find the heads, check that they fit the model, and fill every knob that the user left open.

    Args:
        knobs: What the user has set.
        model: Folder or Hub id.
        revision: Of a Hub id.
        cache: See ``model_folder``.

    Raises:
        EarlyExitError: something does not fit; nothing has been loaded yet.
    """
    folder = model_folder(model, revision, cache)
    num_layers = int(text_config(folder).get("num_hidden_layers", 0))
    if max(_asked_layers(knobs), default=0) >= num_layers:
        raise EarlyExitError(
            f"self-exit: exit_layer={knobs.exit_layer} is beyond the stack; this model has {num_layers} layers, "
            f"choose 1 to {num_layers - 1}"
        )
    draws = knobs.draft_sample_method == "probabilistic"
    if knobs.head == "shared":
        return replace(_resolve_shared(knobs), draws=draws)
    early = _resolve_early_exit(knobs)
    model_print = fingerprint(folder)
    where = _find_heads(knobs.model, folder, model_print, cache)
    heads = read_config(where)
    _check_belongs(heads, where, model, model_print)
    load_heads(where)  # a damaged file is found here, before the model loads
    config = _resolve_trained(knobs, heads, where)
    if early and not all(_mapped(heads.exit(layer)) for layer in config.exit_layers):
        raise EarlyExitError(
            f"self-exit: the heads in {where} lack the calibration for early exits; run 'vllm-earlyexit calibrate'"
        )
    return replace(config, draws=draws, **early)


def _resolve_early_exit(knobs: Knobs) -> dict[str, Any]:
    """Return the fields of ``EarlyExitConfig`` on early exits; none if there are none."""
    accuracy, lowest = knobs.early_exit_accuracy, knobs.lowest_accuracy
    if knobs.mode == "lossless" and accuracy is not None:
        raise EarlyExitError("self-exit: early_exit_accuracy belongs to mode='early_exit'; set that too, or drop it")
    if knobs.mode == "early_exit":
        accuracy = accuracy or max(DEFAULT_ACCURACY, lowest or 0.0)
        lowest = lowest or accuracy
        if accuracy < lowest:
            raise EarlyExitError(f"self-exit: early_exit_accuracy={accuracy:g} is below lowest_accuracy={lowest:g}")
    if lowest is None:
        if knobs.fill_in != "resume":
            raise EarlyExitError("self-exit: fill_in needs early exits; set mode='early_exit' or lowest_accuracy")
        return {}
    rate = knobs.check_rate if knobs.fill_in == "propagate" else 0.0
    return {
        "early_exit_accuracy": accuracy,
        "lowest_accuracy": lowest,
        "fill_in": knobs.fill_in,
        "check_rate": rate,
    }


def _mapped(head: ExitHeadConfig) -> bool:
    return head.calibration is not None and bool(head.calibration.positions)


def _asked_layers(knobs: Knobs) -> tuple[int, ...]:
    """Return the exit layers that the user names, rising; possibly none."""
    asked = () if knobs.exit_layer is None else knobs.exit_layer
    return (asked,) if isinstance(asked, int) else tuple(sorted(set(asked)))


def _resolve_shared(knobs: Knobs) -> EarlyExitConfig:
    if knobs.model is not None:
        raise EarlyExitError("self-exit: head='shared' uses no trained heads; drop either 'model' or 'head'")
    _check_lookup(knobs, "fixed")
    if knobs.mode == "early_exit" or knobs.lowest_accuracy is not None:
        raise EarlyExitError("self-exit: head='shared' is not calibrated, which early exits need; drop either")
    layers = _asked_layers(knobs)
    if not layers:
        raise EarlyExitError("self-exit: head='shared' needs exit_layer, since there is no calibration to choose it")
    if knobs.policy in ("auto", "entropy") or knobs.target_accuracy is not None:
        raise EarlyExitError("self-exit: head='shared' is not calibrated; use policy='fixed' without target_accuracy")
    _check_one(layers, "fixed")
    return EarlyExitConfig(None, layers, knobs.num_speculative_tokens or DEFAULT_DRAFT_LENGTH, "fixed")


def _check_one(layers: tuple[int, ...], policy: str) -> None:
    if policy == "fixed" and len(layers) > 1:
        raise EarlyExitError("self-exit: policy='fixed' drafts from one exit; give one exit_layer")


def _check_lookup(knobs: Knobs, policy: str) -> None:
    if policy != "auto" and knobs.prompt_lookup:
        raise EarlyExitError("self-exit: prompt_lookup belongs to policy='auto'; drop it or change the policy")


def _resolve_trained(knobs: Knobs, heads: HeadsConfig, where: Path) -> EarlyExitConfig:
    best = heads.recommended
    layers = _asked_layers(knobs) or (best.exit_layer if best else heads.exits[0].exit_layer,)
    exits = [heads.exit(layer) for layer in layers]
    calibrated = all(e.calibration is not None for e in exits)
    mapped = all(map(_mapped, exits))
    policy = knobs.policy or _default_policy(knobs, calibrated=calibrated, mapped=mapped)
    if knobs.policy is None and not calibrated:
        logger.warning(
            "self-exit: the heads in %s are not calibrated, so all drafts are equally long, which may be slower than "
            "plain decoding; run 'vllm-earlyexit calibrate'",
            where,
        )
    _check_one(layers, policy)
    length = best.num_speculative_tokens if best else DEFAULT_DRAFT_LENGTH
    length = AUTO_DRAFT_LENGTH if policy == "auto" else length
    draft_length = knobs.num_speculative_tokens or length
    if policy != "entropy" and knobs.target_accuracy is not None:
        raise EarlyExitError("self-exit: target_accuracy belongs to policy='entropy'; drop it or change the policy")
    _check_lookup(knobs, policy)
    if (policy == "entropy" and not calibrated) or (policy == "auto" and not mapped):
        raise EarlyExitError(
            f"self-exit: the heads in {where} are not calibrated; run 'vllm-earlyexit calibrate' or use policy='fixed'"
        )
    thresholds: tuple[float, ...] = ()
    if policy == "entropy":
        accuracy = knobs.target_accuracy or (best.target_accuracy if best else 0.7)
        thresholds = tuple(e.calibration.threshold(accuracy) for e in exits if e.calibration is not None)
    if policy == "auto" and knobs.exit_layer is None:
        exits = [*filter(_mapped, heads.exits)]
    shape = ", ".join(f"{e.kind} {e.intermediate_size} {heads.draft_vocab_size}" for e in exits)
    layers = tuple(e.exit_layer for e in exits)
    lookup = policy == "auto" and knobs.prompt_lookup is not False
    return EarlyExitConfig(str(where.resolve()), layers, draft_length, policy, thresholds, lookup, shape)


def _default_policy(knobs: Knobs, *, calibrated: bool, mapped: bool) -> PolicyName:
    """Return ``auto`` where acceptance is mapped, unless an accuracy is asked for; it needs ``entropy``."""
    if not calibrated:
        return "fixed"
    return "auto" if mapped and knobs.target_accuracy is None else "entropy"
