"""Pictures of a throughput benchmark."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def _by_config(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["concurrency"]):
        found.setdefault(record["config"], []).append(record)
    return found


def speed_against_concurrency(records: list[dict[str, Any]], path: Path) -> None:
    """Draw each configuration's speed over plain decoding's: medians, and the range of all repeats."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="0.7", linewidth=1)
    for config, points in _by_config(records).items():
        points = [point for point in points if point["ratios"]]
        if not points:
            continue
        median = [point["speedup_vs_ar"] for point in points]
        low = [value - min(point["ratios"]) for value, point in zip(median, points, strict=True)]
        high = [max(point["ratios"]) - value for value, point in zip(median, points, strict=True)]
        at = [point["concurrency"] for point in points]
        axes.errorbar(at, median, (low, high), marker="o", label=config, capsize=3)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="concurrent requests", ylabel="tokens per second / plain vLLM", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def quality_against_speed(records: list[dict[str, Any]], path: Path) -> None:
    """Draw each configuration's score on each task over its speed beside plain decoding's; a line for each fill-in.

    Where nothing is solved, it is the share of tokens that are the full model's choice.
    """
    tasks = list(dict.fromkeys(record["task"] for record in records))
    figure = Figure(figsize=(6 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = [record for record in records if record["task"] == task]
        solved = own[0]["score"] is not None
        plain = next((record["tokens_per_s"] for record in own if record["config"] == "ar"), None)
        if plain is None:
            continue
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for record in own:
            name = ":".join(record["config"].split(":")[: 2 if record["config"].startswith(("early", "oracle")) else 1])
            score = record["score"] if solved else record["full_model_choice"]
            point = (record["tokens_per_s"] / plain, score, record["standard_error"] or 0.0)
            lines.setdefault(name, []).append(point)
        for name, points in lines.items():
            speeds, scores, errors = zip(*sorted(points), strict=True)
            axes.errorbar(speeds, scores, errors, marker="o", capsize=3, label=name)
        axes.set(
            title=task,
            xlabel="tokens per second / plain vLLM",
            ylabel="share solved" if solved else "share of tokens that the full model would choose",
        )
        axes.legend()
    figure.savefig(path, dpi=120)


def acceptance_by_position(records: list[dict[str, Any]], path: Path) -> None:
    """Draw the share of drafts whose n-th token was accepted, at the smallest concurrency."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for config, points in _by_config(records).items():
        point = points[0]
        if point["drafts"]:
            shares = [accepted / point["drafts"] for accepted in point["accepted_at"]]
            axes.plot(range(1, len(shares) + 1), shares, marker="o", label=config)
    axes.set(xlabel="draft position", ylabel="share of drafts accepted so far", ylim=(0, 1))
    if axes.has_data():
        axes.legend()
    figure.savefig(path, dpi=120)


def time_split(records: list[dict[str, Any]], path: Path) -> None:
    """Draw where each configuration's milliseconds per token go, at concurrency 1."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    splits = {
        record["config"]: record["ms_per_token_by_part"] for record in records if "ms_per_token_by_part" in record
    }
    parts = list(dict.fromkeys(part for split in splits.values() for part in split))
    left = [0.0] * len(splits)
    for part in parts:
        widths = [split.get(part, 0.0) for split in splits.values()]
        axes.barh(list(splits), widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds per generated token")
    axes.legend()
    figure.savefig(path, dpi=120)
