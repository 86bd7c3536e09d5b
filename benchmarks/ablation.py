"""What each part of a head and of its training is worth: the same data, the same number of tokens, one change a row.

    python -m benchmarks.ablation MODEL --own OWN --text TEXT --test TEST --out RESULT.json

OWN and TEXT are records of the model's own answers and of raw text, TEST of greedy answers to test prompts; agreement
is measured on TEST, which nothing is chosen by.
"""

import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

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


def rows(tokens: int) -> Iterator[Row]:
    """Yield the table's rows; those that decide the default run with three seeds."""
    base = TrainingOptions(max_tokens=tokens, epochs=100, evaluations=1, patience=100, held_out=0.005)
    yield Row("recurrent, KL, own answers, 16384 tokens", base, seeds=SEEDS)
    yield Row("kind: tail", replace(base, kinds=("tail",)), seeds=SEEDS)
    yield Row("kind: mlp", replace(base, kinds=("mlp",)))
    yield Row("kind: linear", replace(base, kinds=("linear",)))
    yield Row("kind: shared", replace(base, kinds=("shared",)))
    yield Row("recurrent without deep keys", replace(base, deep_keys=False), seeds=SEEDS)
    yield Row("tail without deep keys", replace(base, kinds=("tail",), deep_keys=False))
    yield Row("raw text", base, data=("text",))
    yield Row("own answers and raw text", base, data=("own", "text"))
    yield Row("loss: total variation", replace(base, loss="tv"))
    yield Row("loss: cross-entropy", replace(base, loss="ce"), seeds=SEEDS)
    yield Row("draft vocabulary: 4096", replace(base, draft_vocab_size=4096))
    yield Row("draft vocabulary: 8192", replace(base, draft_vocab_size=8192))
    yield Row("draft vocabulary: 32768", replace(base, draft_vocab_size=32768))
    yield Row("target probabilities: 1", replace(base, top_k=1))
    yield Row("target probabilities: 8", replace(base, top_k=8))


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
    work: Annotated[Path, typer.Option()] = Path("build/ablation"),
) -> None:
    """Train every row and measure it."""
    folders = {"own": own, "text": text}
    table = []
    for row in rows(tokens):
        if only not in row.name:
            continue
        agreed, seconds = [], []
        for seed in row.seeds:
            shutil.rmtree(work, ignore_errors=True)
            started = time.monotonic()
            records = [folders[name] for name in row.data]
            heads = train_heads(model, records, work, [exit_layer], replace(row.options, seed=seed))
            seconds.append(round(time.monotonic() - started))
            traces, _ = trace_heads(
                model_folder(model), load_heads(work), [test], every_document=True, tokens=test_tokens, device="cpu"
            )
            agreed.append([trace.agreement for trace in traces[exit_layer]])
            provenance = next(iter(heads.values())).config.provenance
        table.append(
            {
                "row": row.name,
                "agreement": [round(statistics.mean(values), 4) for values in zip(*agreed, strict=True)],
                "agreement_per_seed": agreed,
                "draft_vocab_coverage": provenance["draft_vocab_coverage"],
                "seconds": seconds,
            }
        )
        measured = {"exit_layer": exit_layer, "scored_tokens": tokens, "test_tokens": test_tokens, "rows": table}
        write_result(out, "ablation", measured)


if __name__ == "__main__":
    typer.run(main)
