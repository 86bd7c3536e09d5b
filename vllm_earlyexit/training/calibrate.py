"""Calibrate exit heads on held-out text: entropy thresholds, and the setting that should serve fastest."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import (
    Calibration,
    Heads,
    HeadsConfig,
    Recommendation,
    Threshold,
    load_heads,
    write_config,
)
from vllm_earlyexit.heads.fingerprint import fingerprint, model_folder
from vllm_earlyexit.heads.uncertainty import entropy
from vllm_earlyexit.training.data import Window, batches, windows
from vllm_earlyexit.training.teacher import Teacher
from vllm_earlyexit.training.train import PENDING_DEPTHS

ACCURACIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
DRAFT_LENGTHS = range(1, 9)
STEP_OVERHEAD = 0.4
"""Scheduler, sampler and interpreter time of one engine step, in full forward passes of a small model on a CPU."""


@dataclass(frozen=True)
class Trace:
    """One exit head along held-out text.

    Attributes:
        entropy: Of the head's distribution, nats, float32 [num_tokens].
        agrees: Whether head and full model choose the same token, bool [num_tokens].
        lengths: Length of each continuous stretch; they sum to num_tokens.
    """

    entropy: torch.Tensor
    agrees: torch.Tensor
    lengths: list[int]


@torch.no_grad()
def observe(teacher: Teacher, heads: Heads, items: list[Window], batch_tokens: int = 4096) -> dict[int, Trace]:
    """Run full model and heads over ``items``; return one trace per exit layer."""
    layers = list(heads.modules)
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer: [] for layer in layers}
    lengths: list[int] = []
    for n, step in enumerate(track(list(batches(items, batch_tokens, 0)), description="calibrating")):
        observed = teacher.observe(step, layers, pending=n % PENDING_DEPTHS)
        target = observed.logits.argmax(dim=-1)
        lengths += observed.rows
        for layer, module in heads.modules.items():
            logits = teacher.unembed(observed.features(layer, module), heads.draft_vocab)
            choice = logits.argmax(dim=-1)
            choice = choice if heads.draft_vocab is None else heads.draft_vocab[choice]
            seen[layer].append((entropy(logits), choice == target))
    return {
        layer: Trace(torch.cat([h for h, _ in parts]), torch.cat([a for _, a in parts]), lengths)
        for layer, parts in seen.items()
    }


def thresholds(trace: Trace, accuracies: Sequence[float] = ACCURACIES) -> tuple[Threshold, ...]:
    """Return for each accuracy the largest entropy at or below which head and full model agree at least so often.

    Tokens are sorted by entropy; the accuracy of the surest n is a running mean, and the last n at which it is still
    high enough gives the threshold. Accuracies that not even the surest 1 % reach are left out.
    """
    order = trace.entropy.argsort()
    sorted_entropy = trace.entropy[order]
    running = trace.agrees[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    least = max(1, len(order) // 100)
    found = []
    for accuracy in accuracies:
        good = (running >= accuracy).nonzero().squeeze(-1)
        if len(good) and (last := int(good[-1])) + 1 >= least:
            found.append(
                Threshold(
                    accuracy=accuracy,
                    entropy=round(float(sorted_entropy[last]), 5),
                    coverage=round((last + 1) / len(order), 4),
                )
            )
    return tuple(found)


@dataclass(frozen=True)
class Replay:
    """What drafting along a trace would have done: output tokens, verifications, and draft steps."""

    tokens: int
    verifications: int
    draft_steps: int


def replay(trace: Trace, threshold: float, longest: int) -> Replay:
    """Replay entropy-stopped drafting on held-out text.

    As long as drafts are accepted the text is the one that was observed, so acceptance is exact. After a rejected
    draft the drafter is off the text; how long it then goes on is taken from the text's own next tokens.
    """
    tokens = verifications = draft_steps = 0
    sure_all, agrees_all = (trace.entropy <= threshold).tolist(), trace.agrees.tolist()
    start = 0
    for length in trace.lengths:
        end, at = start + length, start
        while at < end:
            drafted = 0
            while drafted < longest and at + drafted < end and sure_all[at + drafted]:
                drafted += 1
            accepted = 0
            while accepted < drafted and agrees_all[at + accepted]:
                accepted += 1
            draft_steps += drafted if drafted == longest else drafted + 1
            verifications += 1
            tokens += accepted + 1
            at += accepted + 1
        start = end
    return Replay(tokens, verifications, draft_steps)


def draft_cost(config: HeadsConfig, exit_layer: int, layer_size: int) -> float:
    """Return the cost of one draft step in full forward passes, by weights read, as decoding is bound by memory.

    Args:
        config: The heads' config.
        exit_layer: Where the draft exits.
        layer_size: Parameters of one decoder layer.
    """
    exit_config = config.exit(exit_layer)
    mlp = 3 * exit_config.intermediate_size
    head = {"shared": 0, "linear": config.hidden_size, "mlp": mlp, "tail": 2 * mlp + 3 * exit_config.query_size}[
        exit_config.kind
    ]
    shallow = exit_layer * layer_size + config.hidden_size * (head + config.draft_vocab_size)
    return shallow / (config.num_layers * layer_size + config.hidden_size * config.vocab_size)


def recommend(config: HeadsConfig, traces: dict[int, Trace], layer_size: int) -> Recommendation | None:
    """Return the exit, accuracy and draft length with the highest replayed speed, or None without any threshold."""
    best: Recommendation | None = None
    for exit_config in config.exits:
        layer, calibration = exit_config.exit_layer, exit_config.calibration
        cost = draft_cost(config, layer, layer_size)
        for threshold in calibration.thresholds if calibration else ():
            for longest in DRAFT_LENGTHS:
                done = replay(traces[layer], threshold.entropy, longest)
                spent = done.verifications * (1 + STEP_OVERHEAD) + done.draft_steps * cost
                speedup = done.tokens * (1 + STEP_OVERHEAD) / spent
                if best is None or speedup > best.predicted_speedup:
                    best = Recommendation(
                        exit_layer=layer,
                        num_speculative_tokens=longest,
                        target_accuracy=threshold.accuracy,
                        predicted_acceptance_length=round(done.tokens / done.verifications, 3),
                        predicted_speedup=round(speedup, 3),
                    )
    return best


def calibrate_heads(model: str, heads_folder: Path, data: Sequence[Path], *, device: str = "cpu") -> HeadsConfig:
    """Calibrate the heads in ``heads_folder`` on ``data``, which they must not have been trained on.

    Writes thresholds and the recommended setting into the checkpoint's config.json and returns it.

    Raises:
        EarlyExitError: the heads belong to another model, or ``data`` has nothing to measure.
    """
    heads = load_heads(heads_folder)
    folder = model_folder(model)
    if heads.config.fingerprint != fingerprint(folder):
        raise EarlyExitError(f"the heads in {heads_folder} were trained for {heads.config.base_model!r}, not {model!r}")
    teacher = Teacher(folder, torch.bfloat16, device)
    items = windows(data, teacher.tokenizer, 512)
    if not items:
        raise EarlyExitError(f"nothing to calibrate on in {', '.join(map(str, data))}")
    traces = observe(teacher, heads, items)
    exits = tuple(
        exit_config.model_copy(
            update={
                "calibration": Calibration(
                    tokens=len(traces[exit_config.exit_layer].agrees),
                    agreement=round(traces[exit_config.exit_layer].agrees.double().mean().item(), 4),
                    thresholds=thresholds(traces[exit_config.exit_layer]),
                )
            }
        )
        for exit_config in heads.config.exits
    )
    config = heads.config.model_copy(update={"exits": exits})
    layer_size = sum(p.numel() for p in teacher.model.get_decoder().layers[0].parameters())
    provenance = config.provenance | {"calibrated_on": [path.name for path in data]}
    config = config.model_copy(update={"recommended": recommend(config, traces, layer_size), "provenance": provenance})
    write_config(config, heads_folder)
    return config
