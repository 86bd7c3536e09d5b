"""Pictures of training and calibration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def _axes(width: float = 6.0, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), layout="constrained")
    return figure, figure.subplots(1, columns)


def learning_curve(curve: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw held-out agreement against tokens trained on: the first draft position, and the last one dashed."""
    figure, axes = _axes()
    tokens = [point["tokens"] / 1e6 for point in curve]
    for n, name in enumerate(curve[0]["agreement"]):
        values = [point["agreement"][name] for point in curve]
        axes.plot(tokens, [v[0] for v in values], marker=".", color=f"C{n}", label=name)
        axes.plot(
            tokens, [v[-1] for v in values], "--", color=f"C{n}", label=f"{name}, draft position {len(values[0])}"
        )
    axes.set(xlabel="million tokens trained on", ylabel="agreement with the full model, held out", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def reliability(parts: dict[int, tuple[np.ndarray, np.ndarray]], path: Path, bins: int = 15) -> None:
    """Draw predicted against measured acceptance: exit layer to (probability, agrees), each [num_tokens]."""
    figure, axes = _axes(4.5)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for layer, (probability, agrees) in parts.items():
        groups = [part for part in np.array_split(np.argsort(probability), bins) if len(part)]
        axes.plot(
            [probability[part].mean() for part in groups],
            [agrees[part].mean() for part in groups],
            marker=".",
            label=f"exit after layer {layer}",
        )
    axes.set(xlabel="predicted acceptance probability", ylabel="measured, other documents", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)


def risk_coverage(traces: dict[int, Any], path: Path) -> None:
    """Draw the error rate of the surest tokens, by entropy, against their share: exit layer to ``Trace``."""
    figure, axes = _axes(4.5)
    for layer, trace in traces.items():
        wrong = ~trace.agrees.numpy()[np.argsort(trace.entropy.numpy(), kind="stable")]
        count = np.arange(1, len(wrong) + 1)
        drawn = slice(len(wrong) // 200, None, max(1, len(wrong) // 400))
        axes.plot((count / len(wrong))[drawn], (np.cumsum(wrong) / count)[drawn], label=f"exit after layer {layer}")
    axes.set(
        xlabel="coverage: share of tokens drafted", ylabel="risk: share of these rejected", xlim=(0, 1), ylim=(0, 1)
    )
    axes.legend()
    figure.savefig(path, dpi=120)
