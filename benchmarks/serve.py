"""Servers side by side, each driven by vLLM's own ``vllm bench serve``.

    python -m benchmarks.serve plain= self-exit="--speculative-model [self-exit]" --model MODEL
        --serve-arguments "--dtype float32 --max-model-len 2048" --prompts FILE.jsonl --num-prompts 40
        --max-tokens 128 --concurrency 1 8 --repeats 5 --out FOLDER

The first server is the baseline. Each is first started, asked and ended alone. Then all are started and take turns, a
run each in an order that is reversed every other repeat, and all others are stopped meanwhile. Where medians of the two
differ by more than 5 %, nothing is reported: results.json says so, there is no table, and the exit status is 1.

With ``--ramp 1 4 8 16 8 1`` a turn is all of these concurrencies, one after the other. Then every record also has, for
each full ten seconds from its stage's start, the generated tokens relative to the baseline's in the same ones. Ratios
are to the baseline of the same repeat.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.contestant import engine_environment
from benchmarks.progress import progress_on, say
from benchmarks.proof import doubted, proof
from benchmarks.servers import Server
from benchmarks.throughput import spread
from benchmarks.windows import relative
from vllm_earlyexit.provenance import provenance
from vllm_earlyexit.training.records import read_records

MEASURED = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "completed", "total_output_tokens")
COMPILED_SECONDS = 1200
"""In which a server starts that has to compile its model first."""
Run = dict[str, Any]
"""What ``vllm bench serve`` measured."""


@dataclass(frozen=True)
class Entrant:
    """A server to be.

    Attributes:
        name: What results call it.
        arguments: Of its ``vllm serve``, besides those of all.
    """

    name: str
    arguments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Entrant":
        """Read NAME=ARGUMENTS.

        Raises:
            argparse.ArgumentTypeError: it is not that.
        """
        name, equals, arguments = text.partition("=")
        if not name or not equals or name.startswith("-"):
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=ARGUMENTS, as in plain=")
        return cls(name, tuple(shlex.split(arguments)))


@dataclass(frozen=True)
class Stage:
    """A run of ``vllm bench serve``.

    Attributes:
        number: From 0, among those of a repeat.
        concurrency: Requests at a time.
        num_prompts: How many requests altogether.
        warm_up: Requests before it that do not count.
    """

    number: int
    concurrency: int
    num_prompts: int
    warm_up: int


@dataclass(frozen=True)
class Load:
    """What every server is asked.

    Attributes:
        model: Folder or Hub id.
        dataset: JSON lines with ``prompt``, as ``vllm bench serve`` reads them, enough for the longest stage.
        max_tokens: Longest answer.
    """

    model: str
    dataset: Path
    max_tokens: int

    def command(self, url: str, stage: Stage, result: Path) -> list[str]:
        """Return the ``vllm bench serve`` that asks a server greedily and writes ``result``."""
        options = {
            "--backend": "openai-chat",
            "--endpoint": "/v1/chat/completions",
            "--base-url": url,
            "--model": self.model,
            "--dataset-name": "custom",
            "--dataset-path": self.dataset,
            "--num-prompts": stage.num_prompts,
            "--num-warmups": stage.warm_up,
            "--custom-output-len": self.max_tokens,
            "--max-concurrency": stage.concurrency,
            "--temperature": 0,
            "--percentile-metrics": "ttft,tpot",
            "--result-dir": result.parent,
            "--result-filename": result.name,
        }
        flags = ["--skip-chat-template", "--disable-shuffle", "--save-result", "--save-detailed", "--disable-tqdm"]
        given = [str(part) for pair in options.items() for part in pair]
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", *given, *flags]


def ask(name: str, server: Server, load: Load, stage: Stage) -> Run:
    """Run ``vllm bench serve`` once; return its result.

    Raises:
        SystemExit: it failed, or a request did; the message ends with what it printed last.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = load.command(server.url.removesuffix("/v1"), stage, result)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not result.exists():
            raise SystemExit(f"vllm bench serve failed on {name}, whose log is {server.log}: {done.stderr[-2000:]}")
        measured = json.loads(result.read_text())
    if measured["completed"] != stage.num_prompts:
        raise SystemExit(f"{name} answered {measured['completed']} of {stage.num_prompts} requests: {server.log}")
    return measured


def stages_of(options: argparse.Namespace, num_prompts: int) -> list[list[Stage]]:
    """Return the stages of one repeat, those of one turn together."""
    if options.ramp:
        each = options.prompts_per_stage
        ramp = [Stage(n, width, each * width, 0) for n, width in enumerate(options.ramp)]
        return [[replace(ramp[0], warm_up=2 * ramp[0].concurrency), *ramp[1:]]]
    widths = dict.fromkeys(options.concurrency)
    return [[Stage(n, width, num_prompts, min(num_prompts, 2 * width))] for n, width in enumerate(widths)]


def order(entrants: list[Entrant], repeat: int) -> list[Entrant]:
    """Return servers in the order of their turns, which is reversed every other repeat."""
    return entrants if repeat % 2 == 0 else entrants[::-1]


def record(name: str, load: Load, stage: Stage, runs: list[Run], base: list[Run], alone: list[Run]) -> dict[str, Any]:
    """Return one record of results.json: medians over a server's runs in turns, and its raw speeds."""
    speeds = [run["output_throughput"] for run in runs]
    ratios = [speed / other["output_throughput"] for speed, other in zip(speeds, base, strict=True)]
    accepted = [run["spec_decode_acceptance_rate"] for run in runs if "spec_decode_acceptance_rate" in run]
    return {
        "server": name,
        "model": Path(load.model).name,
        "stage": stage.number,
        "concurrency": stage.concurrency,
        "num_prompts": stage.num_prompts,
        "max_tokens": load.max_tokens,
        **{key: round(statistics.median(run[key] for run in runs), 3) for key in MEASURED},
        "speedup": round(statistics.median(ratios), 3),
        "acceptance_rate": round(statistics.median(accepted) / 100, 4) if accepted else None,
        "repeats": [round(speed, 2) for speed in speeds],
        "ratios": [round(ratio, 3) for ratio in ratios],
        **proof(speeds, [run["output_throughput"] for run in alone]),
    }


def windows(runs: list[Run], base: list[Run]) -> dict[str, Any]:
    """Return what a record of a ramp says of its stage's windows, repeat by repeat, and the lowest of all."""
    found = [relative(run, other) for run, other in zip(runs, base, strict=True)]
    return {"windows": found, "lowest_window": min((ratio for each in found for ratio in each), default=None)}


class Servers:
    """Servers that were started, by name.

    Args:
        options: The command line's.
        folder: Where they log.
    """

    def __init__(self, options: argparse.Namespace, folder: Path):
        self._options, self._folder = options, folder
        self.running: dict[str, Server] = {}

    def start(self, entrant: Entrant, load: Load, first: Stage) -> Server:
        """Start one and ask it once, which does not count; it is not paused."""
        arguments = [*shlex.split(self._options.serve_arguments), *entrant.arguments]
        log = self._folder / f"{entrant.name}.log"
        server = self.running[entrant.name] = Server(Path(self._options.model), log, *arguments)
        try:
            server.wait(COMPILED_SECONDS)
        except RuntimeError as error:
            raise SystemExit(f"{entrant.name}: {error}") from None
        ask(entrant.name, server, load, first)
        return server

    def stop(self) -> None:
        """End all."""
        while self.running:
            self.running.popitem()[1].stop()


def measure(
    options: argparse.Namespace, load: Load, turns: list[list[Stage]], servers: Servers, progress: Progress
) -> Iterator[tuple[str, str, Stage, Run]]:
    """Ask every server alone, then in turns; yield ``alone`` or ``turns``, the server's name, the stage, the result."""
    entrants: list[Entrant] = options.servers
    stages = sum(map(len, turns))
    bar = progress.add_task("alone", total=len(entrants) * stages * options.alone_repeats)
    for entrant in entrants:
        say(progress, bar, f"alone: starting {entrant.name}")
        server = servers.start(entrant, load, turns[0][0])
        for _ in range(options.alone_repeats):
            for stage in (stage for turn in turns for stage in turn):
                say(progress, bar, f"alone: {entrant.name} at {stage.concurrency}")
                yield "alone", entrant.name, stage, ask(entrant.name, server, load, stage)
                progress.advance(bar)
        servers.stop()
    bar = progress.add_task("in turns", total=len(entrants))
    for entrant in entrants:
        say(progress, bar, f"in turns: starting {entrant.name}")
        servers.start(entrant, load, turns[0][0]).pause()
        progress.advance(bar)
    progress.update(bar, description="in turns: started")
    bar = progress.add_task("in turns", total=len(entrants) * stages * options.repeats)
    for repeat in range(options.repeats):
        for turn in turns:
            for entrant in order(entrants, repeat):
                server = servers.running[entrant.name]
                with server.turn():
                    for stage in turn:
                        say(progress, bar, f"in turns: repeat {repeat + 1}, {entrant.name} at {stage.concurrency}")
                        yield "turns", entrant.name, stage, ask(entrant.name, server, load, stage)
                        progress.advance(bar)
    servers.stop()


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options; by default this process's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve")
    parser.add_argument(
        "servers",
        type=Entrant.parse,
        nargs="+",
        metavar="NAME=ARGUMENTS",
        help="A server's name and what its vllm serve is told, the baseline first, as in plain=",
    )
    parser.add_argument("--model", required=True, help="Folder or Hub id.")
    parser.add_argument(
        "--serve-arguments",
        default="",
        help="What every vllm serve is told, all of it in one argument: --serve-arguments='--dtype float32'.",
    )
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with turns; the first turn is asked.")
    parser.add_argument("--num-prompts", type=int, default=20, help="Evenly spread over the file.")
    parser.add_argument("--max-tokens", type=int, default=128)
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--concurrency", type=int, nargs="+", default=[1], help="Requests at a time, a turn each.")
    many.add_argument("--ramp", type=int, nargs="+", help="Requests at a time, one after the other in one turn.")
    parser.add_argument(
        "--prompts-per-stage",
        type=int,
        default=20,
        help="Requests of a ramp's stage for each request at a time; more of them make a stage longer.",
    )
    parser.add_argument("--repeats", type=int, default=5, help="Turns of each server.")
    parser.add_argument("--alone-repeats", type=int, default=2, help="Runs of each server alone.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of results.json.")
    options = parser.parse_args(arguments)
    if len({entrant.name for entrant in options.servers}) < len(options.servers):
        parser.error("servers must have different names")
    counts = (options.repeats, options.alone_repeats, options.num_prompts, options.prompts_per_stage)
    if min(*counts, *options.concurrency, *(options.ramp or [])) < 1:
        parser.error("numbers must be at least 1")
    return options


def main() -> None:
    """Ask all servers, alone and in turns, and report medians if these agree."""
    options, console = parsed(), Console()
    if Path(options.model).exists():
        options.model = str(Path(options.model).resolve())
    os.environ |= engine_environment()
    prompts = spread([item["turns"][0] for item in read_records(options.prompts)], options.num_prompts)
    turns = stages_of(options, len(prompts))
    runs: dict[str, dict[tuple[str, Stage], list[Run]]] = {"alone": {}, "turns": {}}
    folder = Path(tempfile.mkdtemp(prefix="serve-"))
    longest = max(stage.num_prompts for turn in turns for stage in turn)
    asked = (json.dumps({"prompt": prompt}) + "\n" for prompt in islice(cycle(prompts), longest))
    load = Load(options.model, folder / "prompts.jsonl", options.max_tokens)
    load.dataset.write_text("".join(asked))
    with progress_on(console) as progress:
        servers = Servers(options, folder)
        try:
            for kind, name, stage, run in measure(options, load, turns, servers, progress):
                runs[kind].setdefault((name, stage), []).append(run)
        finally:
            servers.stop()
    shutil.rmtree(folder)
    baseline = options.servers[0].name
    records, source = [], provenance("python -m benchmarks.serve")
    for (name, stage), done in runs["turns"].items():
        base = runs["turns"][baseline, stage]
        item = record(name, load, stage, done, base, runs["alone"][name, stage])
        records.append(item | (windows(done, base) if options.ramp else {}) | {"provenance": source})
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    if doubted(records, "server", "output_throughput", console):
        raise SystemExit(1)
    console.print(_table(records))


def _table(records: list[dict[str, Any]]) -> Table:
    columns = ["server", "concurrency", "output_throughput", "speedup", "median_ttft_ms", "median_tpot_ms"]
    columns += ["acceptance_rate", *(["lowest_window"] if "lowest_window" in records[0] else [])]
    table = Table(*columns)
    for item in records:
        table.add_row(*("" if item[name] is None else str(item[name]) for name in columns))
    return table


if __name__ == "__main__":
    main()
