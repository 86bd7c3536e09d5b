"""Calibrate exit heads on held-out documents: thresholds, acceptance probabilities, and the setting to serve with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import isotonic_regression

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import (
    Calibration,
    Heads,
    HeadsConfig,
    PositionCalibration,
    Recommendation,
    Threshold,
    load_heads,
    write_config,
)
from vllm_earlyexit.heads.fingerprint import fingerprint, model_folder
from vllm_earlyexit.training.classroom import MEASURED_STEPS, Classroom
from vllm_earlyexit.training.packs import Records
from vllm_earlyexit.training.plots import reliability, risk_coverage
from vllm_earlyexit.training.signals import compare
from vllm_earlyexit.training.teacher import Teacher
from vllm_earlyexit.training.traces import Trace, observe

ACCURACIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
DRAFT_LENGTHS = range(1, 9)
KNOTS = 32
STEP_OVERHEAD = 0.4
"""Scheduler, sampler and interpreter time of one engine step, in full forward passes of a small model on a CPU."""
DRAFT_OVERHEAD = 0.25
"""The same for one draft step, beyond the weights it reads: 14 ms where a plain step takes 35 (the demo, float32)."""


def entropy_threshold(entropy: np.ndarray, agrees: np.ndarray, accuracy: float) -> float | None:
    """Return the largest entropy at or below which head and full model agree at least so often.

    Tokens are sorted by entropy; the accuracy of the surest n is a running mean, and the last n at which it is still
    high enough gives the threshold. An accuracy that not even the surest 1 % reach has none.
    """
    order = np.argsort(entropy, kind="stable")
    running = agrees[order].cumsum() / np.arange(1, len(order) + 1)
    good = np.flatnonzero(running >= accuracy)
    if not len(good) or good[-1] + 1 < max(1, len(order) // 100):
        return None
    return float(entropy[order[good[-1]]])


def thresholds(trace: Trace, accuracies: Sequence[float] = ACCURACIES) -> tuple[Threshold, ...]:
    """Return the threshold of each accuracy, and the accuracy that it has on documents it is not fitted on.

    The latter is measured on either half of the documents with the threshold of the other half.
    """
    entropy, agrees, half = trace.entropy.numpy(), trace.agrees.numpy(), folds(trace)
    found = []
    for accuracy in accuracies:
        limit = entropy_threshold(entropy, agrees, accuracy)
        if limit is None:
            continue
        kept = []
        for side in (half, ~half):
            elsewhere = entropy_threshold(entropy[~side], agrees[~side], accuracy) if (~side).any() else None
            if elsewhere is not None:
                kept.append(agrees[side][entropy[side] <= elsewhere])
        measured = np.concatenate(kept) if kept else np.array([])
        found.append(
            Threshold(
                accuracy=accuracy,
                entropy=round(limit, 5),
                coverage=round(float((entropy <= limit).mean()), 4),
                measured=round(float(measured.mean()), 4) if len(measured) else None,
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class AcceptanceMap:
    """A falling map from entropy to the probability of being accepted, linear between its knots.

    Attributes:
        entropy: Knots in nats, rising, [num_knots].
        probability: Falling, [num_knots].
    """

    entropy: np.ndarray
    probability: np.ndarray

    @staticmethod
    def fit(entropy: np.ndarray, agrees: np.ndarray, knots: int = KNOTS) -> "AcceptanceMap":
        """Fit by isotonic regression on bins of equally many tokens (Zadrozny and Elkan, KDD 2002)."""
        order = np.argsort(entropy, kind="stable")
        bins = [part for part in np.array_split(order, knots) if len(part)]
        middles = np.array([entropy[part].mean() for part in bins])
        means = np.array([agrees[part].mean() for part in bins])
        sizes = np.array([len(part) for part in bins], dtype=float)
        return AcceptanceMap(middles, isotonic_regression(means, weights=sizes, increasing=False).x)

    def __call__(self, entropy: np.ndarray) -> np.ndarray:
        """Return acceptance probabilities, of the shape of ``entropy``."""
        return np.interp(entropy, self.entropy, self.probability)


def expected_calibration_error(probability: np.ndarray, agrees: np.ndarray, bins: int = 15) -> float:
    """Return the mean distance between probability and rate of agreement, over bins of equally many tokens.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    order = np.argsort(probability, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return float(sum(len(p) * abs(probability[p].mean() - agrees[p].mean()) for p in parts) / len(order))


def folds(trace: Trace) -> np.ndarray:
    """Return which half of the documents each token belongs to, bool [num_tokens]."""
    documents = trace.token_documents.numpy()
    known = np.unique(documents)
    return np.isin(documents, known[::2])


def cross_fitted(trace: Trace) -> np.ndarray:
    """Return each token's acceptance probability from a map that was fitted on the other half of the documents."""
    entropy, agrees, half = trace.entropy.numpy(), trace.agrees.numpy(), folds(trace)
    probability = np.empty(len(entropy))
    for side in (half, ~half):
        probability[side] = AcceptanceMap.fit(entropy[~side], agrees[~side])(entropy[side])
    return probability


def position_calibration(trace: Trace, deeper: Trace | None = None) -> PositionCalibration:
    """Return one draft position's map, fitted on all documents; its error is that of maps fitted on other documents.

    Args:
        trace: The exit's at this position.
        deeper: The next exit's, of the same tokens.
    """
    fitted = AcceptanceMap.fit(trace.entropy.numpy(), trace.agrees.numpy())
    several = len(set(trace.documents)) > 1
    return PositionCalibration(
        agreement=trace.agreement,
        entropy=tuple(np.round(fitted.entropy, 4).tolist()),
        probability=tuple(np.round(fitted.probability, 4).tolist()),
        expected_calibration_error=round(
            expected_calibration_error(cross_fitted(trace), trace.agrees.numpy()) if several else 1.0, 4
        ),
        deeper=() if deeper is None else _agreement_at(trace.entropy.numpy(), deeper.agrees.numpy()),
    )


def _agreement_at(entropy: np.ndarray, agrees: np.ndarray) -> tuple[float, ...]:
    """Return the mean of ``agrees`` at the knots of ``AcceptanceMap.fit``, over the tokens of each."""
    order = np.argsort(entropy, kind="stable")
    return tuple(round(float(agrees[part].mean()), 4) for part in np.array_split(order, KNOTS) if len(part))


@dataclass(frozen=True)
class Replay:
    """What drafting along a trace would have done: output tokens, verifications, and draft steps."""

    tokens: int
    verifications: int
    draft_steps: int


def replay(traces: Sequence[Trace], threshold: float, longest: int) -> Replay:
    """Replay entropy-stopped drafting on held-out text; ``traces`` are of draft positions 1, 2, …, the last for more.

    As long as drafts are accepted the text is the one that was observed, so acceptance is exact. After a rejected
    draft the drafter is off the text; how long it then goes on is taken from the text's own next tokens.
    """
    tokens = verifications = draft_steps = 0
    sure = [(trace.entropy <= threshold).tolist() for trace in traces]
    agrees = [trace.agrees.tolist() for trace in traces]
    last = len(traces) - 1
    start = 0
    for length in traces[0].lengths:
        end, at = start + length, start
        while at < end:
            drafted = 0
            while drafted < longest and at + drafted < end and sure[min(drafted, last)][at + drafted]:
                drafted += 1
            accepted = 0
            while accepted < drafted and agrees[min(accepted, last)][at + accepted]:
                accepted += 1
            draft_steps += drafted if drafted == longest else drafted + 1
            verifications += 1
            tokens += accepted + 1
            at += accepted + 1
        start = end
    return Replay(tokens, verifications, draft_steps)


def head_cost(config: HeadsConfig, exit_layer: int) -> int:
    """Return the weights that one draft step reads for its head: the module and the draft vocabulary's rows."""
    exit_config = config.exit(exit_layer)
    size, mlp, query = config.hidden_size, 3 * exit_config.intermediate_size, exit_config.query_size
    module = {
        "shared": 0,
        "linear": size,
        "mlp": size + mlp,
        "tail": size + 2 * mlp + 3 * query,
        "recurrent": 2 * size + 2 * mlp + 3 * query,
    }
    return size * (module[exit_config.kind] + config.draft_vocab_size)


def draft_cost(config: HeadsConfig, exit_layer: int, layer_size: int) -> float:
    """Return the cost of one draft step in full forward passes, by weights read, as decoding is bound by memory.

    Args:
        config: The heads' config.
        exit_layer: Where the draft exits.
        layer_size: Parameters of one decoder layer.
    """
    full = config.num_layers * layer_size + config.hidden_size * config.vocab_size
    return (exit_layer * layer_size + head_cost(config, exit_layer)) / full


def recommend(config: HeadsConfig, traces: dict[int, list[Trace]], layer_size: int) -> Recommendation | None:
    """Return the exit, accuracy and draft length with the highest replayed speed, or None without any threshold."""
    best: Recommendation | None = None
    for exit_config in config.exits:
        layer, calibration = exit_config.exit_layer, exit_config.calibration
        cost = draft_cost(config, layer, layer_size)
        for threshold in calibration.thresholds if calibration else ():
            for longest in DRAFT_LENGTHS:
                done = replay(traces[layer], threshold.entropy, longest)
                spent = done.verifications * (1 + STEP_OVERHEAD) + done.draft_steps * (cost + DRAFT_OVERHEAD)
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


def calibrate_heads(
    model: str, heads_folder: Path, records: Sequence[Path], *, every_document: bool = False, device: str = "cpu"
) -> HeadsConfig:
    """Calibrate the heads in ``heads_folder`` on held-out documents of ``records``.

    Writes thresholds, maps, the comparison of uncertainty measures and the recommended setting into the checkpoint's
    config.json, and pictures beside it.

    Args:
        model: Folder or Hub id of the base model.
        heads_folder: The checkpoint.
        records: Records folders; of those that the heads were trained on, only held-out documents are used.
        every_document: Use all documents; for records that the heads were not trained on.
        device: Where to run.

    Returns:
        The new config.

    Raises:
        EarlyExitError: heads, records and model do not belong together, or nothing is held out.
    """
    heads = load_heads(heads_folder)
    folder = model_folder(model)
    if heads.config.fingerprint != fingerprint(folder):
        raise EarlyExitError(f"the heads in {heads_folder} were trained for {heads.config.base_model!r}, not {model!r}")
    traces, layer_size = trace_heads(folder, heads, records, every_document=every_document, device=device)
    exits = []
    for exit_config, above in zip(heads.config.exits, [*heads.config.exits[1:], None], strict=True):
        here = traces[exit_config.exit_layer]
        deeper: Sequence[Trace | None] = [None] * len(here) if above is None else traces[above.exit_layer]
        calibration = Calibration(
            tokens=len(here[0].agrees),
            agreement=here[0].agreement,
            thresholds=thresholds(here[0]),
            draft_cost=round(draft_cost(heads.config, exit_config.exit_layer, layer_size), 4),
            positions=tuple(position_calibration(*pair) for pair in zip(here, deeper, strict=True)),
            signals=compare(here[0], folds(here[0])),
        )
        exits.append(exit_config.model_copy(update={"calibration": calibration}))
    provenance = heads.config.provenance | {"calibrated_on": [path.name for path in records]}
    config = heads.config.model_copy(update={"exits": tuple(exits), "provenance": provenance})
    config = config.model_copy(update={"recommended": recommend(config, traces, layer_size)})
    write_config(config, heads_folder)
    probabilities = {layer: (cross_fitted(here[0]), here[0].agrees.numpy()) for layer, here in traces.items()}
    reliability(probabilities, heads_folder / "reliability.png")
    risk_coverage({layer: here[0] for layer, here in traces.items()}, heads_folder / "risk-coverage.png")
    return config


def trace_heads(
    folder: Path,
    heads: Heads,
    records: Sequence[Path],
    *,
    every_document: bool,
    device: str,
    tokens: int | None = None,
) -> tuple[dict[int, list[Trace]], int]:
    """Return the heads' traces per exit layer and draft position, and the number of parameters of a decoder layer.

    Args:
        folder: The base model's.
        heads: Its heads.
        records: Records folders of the same model.
        every_document: Use all documents, not only those that were held out from training.
        device: Where to run.
        tokens: Use about so many scored tokens, spread over the records; None for all.

    Raises:
        EarlyExitError: the records are of another model or cut elsewhere, or nothing is held out.
    """
    opened = Records(records)
    layers = tuple(heads.modules)
    missing = set(layers) - set(opened.config.exit_layers)
    if opened.config.fingerprint != heads.config.fingerprint or missing:
        raise EarlyExitError(
            f"the records are of {opened.config.base_model!r}, cut at layers {opened.config.exit_layers}; "
            f"these heads need {heads.config.base_model!r}, cut at {layers}"
        )
    share = 1.0 if every_document else heads.config.provenance["options"]["held_out"]
    packs = opened.packs(2048, (*layers, opened.config.num_layers - 1), share, True)
    if tokens is not None:
        packs = packs.limited(tokens)
    if not len(packs):
        raise EarlyExitError(f"no document of {', '.join(map(str, records))} is held out; collect more")
    teacher = Teacher(folder, device)
    heads.to(device)
    return observe(Classroom.of(teacher, heads.draft_vocab), heads, packs, MEASURED_STEPS), teacher.layer_size
