"""What each part of a head and of its training is worth: the same data, the same number of tokens, one change a row.

    python -m benchmarks.ablation MODEL --own OWN --text TEXT --test TEST --out RESULT.json

OWN and TEXT are records of the model's own answers and of raw text, TEST of greedy answers to test prompts; agreement
is measured on TEST, which nothing is chosen by.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.results import write_result
from vllm_earlyexit.heads.checkpoint import load_heads
from vllm_earlyexit.heads.fingerprint import model_folder
from vllm_earlyexit.training.calibrate import trace_heads
from vllm_earlyexit.training.train import TrainingOptions, train_heads

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    options: TrainingOptions
    data: tuple[str, ...] = ("own",)
    seeds: tuple[int, ...] = (0,)
    exit_layer: int | None = None


def rows(tokens: int) -> Iterator[Row]:
    """Yield the table's rows; those that decide the default run with three seeds."""
    base = TrainingOptions(max_tokens=tokens, epochs=100, evaluations=1, patience=100, held_out=0.005)
    yield Row("recurrent, KL, own answers, draft vocabulary 16384, steps of 512 tokens", base, seeds=SEEDS)
    yield Row("exit after layer 4", base, exit_layer=4)
    yield Row("steps of 2048 tokens", replace(base, batch_tokens=2048))
    yield Row("kind: tail", replace(base, kinds=("tail",)), seeds=SEEDS)
    yield Row("kind: mlp", replace(base, kinds=("mlp",)))
    yield Row("kind: linear", replace(base, kinds=("linear",)))
    yield Row("kind: shared", replace(base, kinds=("shared",)))
    yield Row("recurrent without deep keys", replace(base, deep_keys=False), seeds=SEEDS)
    yield Row("tail without deep keys", replace(base, kinds=("tail",), deep_keys=False))
    yield Row("raw text", replace(base, held_out=0.1), data=("text",))  # a few long documents
    yield Row("own answers and raw text", base, data=("own", "text"))
    yield Row("without the distance to features", replace(base, feature_weight=0.0), seeds=SEEDS)
    yield Row("loss: total variation", replace(base, loss="tv"))
    yield Row("loss: cross-entropy", replace(base, loss="ce"), seeds=SEEDS)
    yield Row("draft vocabulary: 4096", replace(base, draft_vocab_size=4096))
    yield Row("draft vocabulary: 8192", replace(base, draft_vocab_size=8192))
    yield Row("draft vocabulary: 32768", replace(base, draft_vocab_size=32768))
    yield Row("target probabilities: 1", replace(base, top_k=1))
    yield Row("target probabilities: 8", replace(base, top_k=8))


@dataclass(frozen=True)
class Task:
    """One row with one seed."""

    row: Row
    seed: int
    model: str
    records: list[Path]
    test: Path
    exit_layer: int
    test_tokens: int


def run(task: Task) -> tuple[list[float], float, int]:
    """Train and measure; return agreement per draft position, coverage of the draft vocabulary, and seconds."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work, layer = Path(folder), task.exit_layer
        heads = train_heads(task.model, task.records, work, [layer], replace(task.row.options, seed=task.seed))
        seconds = round(time.monotonic() - started)
        traces, _ = trace_heads(
            model_folder(task.model),
            load_heads(work),
            [task.test],
            every_document=True,
            tokens=task.test_tokens,
            device="cpu",
        )
    coverage = next(iter(heads.values())).config.provenance["draft_vocab_coverage"]
    return [trace.agreement for trace in traces[layer]], coverage, seconds


def main(
    model: str,
    own: Annotated[Path, typer.Option()],
    text: Annotated[Path, typer.Option()],
    test: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    exit_layer: Annotated[int, typer.Option()] = 8,
    tokens: Annotated[int, typer.Option(help="Scored tokens that every row is trained on.")] = 100_000,
    test_tokens: Annotated[int, typer.Option()] = 12_000,
    only: Annotated[str, typer.Option(help="Run rows whose name contains this.")] = "",
    jobs: Annotated[int, typer.Option(help="Rows at a time, each on its share of the cores.")] = 1,
) -> None:
    """Train every row and measure it."""
    folders = {"own": own, "text": text}
    chosen = [row for row in rows(tokens) if only in row.name]
    tasks = [
        Task(row, seed, model, [folders[name] for name in row.data], test, row.exit_layer or exit_layer, test_tokens)
        for seed in SEEDS  # an interrupted run has seen every row at least once
        for row in chosen
        if seed in row.seeds
    ]
    shape = {"exit_layer": exit_layer, "scored_tokens": tokens, "test_tokens": test_tokens}
    table = known_rows(out, shape)
    tasks = [t for t in tasks if t.seed >= len(table.get(t.row.name, {}).get("agreement_per_seed", []))]
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        for task, (agreed, coverage, seconds) in zip(tasks, pool.map(run, tasks), strict=True):
            line = table.setdefault(
                task.row.name,
                {"row": task.row.name, "agreement_per_seed": [], "draft_vocab_coverage": coverage, "seconds": []},
            )
            line["agreement_per_seed"].append(agreed)
            line["seconds"].append(seconds)
            each = zip(*line["agreement_per_seed"], strict=True)
            line["agreement"] = [round(statistics.mean(values), 4) for values in each]
            write_result(out, "ablation", shape | {"rows": list(table.values())})


def known_rows(out: Path, shape: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Return by name the rows that an interrupted run has left in ``out``, if it was of the same ``shape``."""
    if not out.exists():
        return {}
    found = json.loads(out.read_text())
    if any(found[name] != value for name, value in shape.items()):
        return {}
    return {line["row"]: line for line in found["rows"]}


if __name__ == "__main__":
    typer.run(main)
