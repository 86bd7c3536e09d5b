"""From nothing to heads as a user makes them: how long it takes, and how close they come to the best known ones.

    python -m benchmarks.minutes MODEL --prompts FILE.jsonl --test TEST --reference RESULT.json --out RESULT.json
        --collecting '--num-prompts 900' --training '--epochs 3'

TEST is a folder of ``vllm-earlyexit collect --sampled 0`` over test prompts, the reference a result of
``benchmarks.heads`` on the same records. Collecting and training run as a user's commands, in processes of their own.
"""

import json
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.results import write_result
from vllm_earlyexit.heads.checkpoint import load_heads
from vllm_earlyexit.heads.fingerprint import model_folder
from vllm_earlyexit.training.calibrate import trace_heads


def timed(*arguments: str) -> dict[str, object]:
    """Run one command of vllm-earlyexit; return it with its seconds and what it printed last."""
    started = time.monotonic()
    command = [sys.executable, "-m", "vllm_earlyexit.cli", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    said = [line.strip() for line in done.stdout.splitlines() if "GB of memory" in line or "recorded tokens" in line]
    said = [re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/", "", line) for line in said]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # the largest child so far
    return {"seconds": round(time.monotonic() - started), "said": said, "largest_peak_gb": round(peak / 1e9, 2)}


def main(
    model: str,
    prompts: Annotated[Path, typer.Option()],
    test: Annotated[Path, typer.Option()],
    reference: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    exit_layer: Annotated[int, typer.Option()] = 10,
    collecting: Annotated[str, typer.Option(help="Further options of collect.")] = "--num-prompts 900",
    training: Annotated[str, typer.Option(help="Further options of train.")] = "--epochs 3",
) -> None:
    """Collect, train, and compare agreement with the reference's."""
    with tempfile.TemporaryDirectory() as scratch:
        records, heads = f"{scratch}/records", f"{scratch}/heads"
        exits = ["--exit-layer", str(exit_layer)]
        asked = ["--prompts", str(prompts), *shlex.split(collecting)]
        collect = timed("collect", model, "--out", records, *asked, *exits)
        train = timed("train", model, "--records", records, "--out", heads, *exits, *shlex.split(training))
        loaded = load_heads(Path(heads))
        traces, _ = trace_heads(model_folder(model), loaded, [test], every_document=True, device="cpu")
    agreed = [trace.agreement for trace in traces[exit_layer]]
    best = next(e for e in json.loads(reference.read_text())["exits"] if e["exit_layer"] == exit_layer)["agreement"]
    measured = {
        "exit_layer": exit_layer,
        "minutes": round((int(str(collect["seconds"])) + int(str(train["seconds"]))) / 60, 1),
        "agreement": agreed,
        "reference_agreement": best,
        "share_of_reference": round(agreed[0] / best[0], 3),
        "collect": collect,
        "train": train,
        "curve": loaded.config.provenance["curve"],
    }
    write_result(out, "minutes", measured)


if __name__ == "__main__":
    typer.run(main)
