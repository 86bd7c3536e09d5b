"""Running servers side by side, each driven by vLLM's own ``vllm bench serve``.

    vllm serve MODEL --port 8000 &
    vllm serve MODEL --port 8001 --speculative-model '[self-exit]' &
    python -m benchmarks.serve plain=http://127.0.0.1:8000 self-exit=http://127.0.0.1:8001 --model MODEL
        --prompts FILE.jsonl --num-prompts 40 --max-tokens 128 --concurrency 1 8 --repeats 5 --out FOLDER

Servers take turns, one run at a time, and the order is reversed every other repeat; ratios are to the first server of
the same repeat. Writes results.json into FOLDER and prints a table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.throughput import spread
from vllm_earlyexit.provenance import provenance
from vllm_earlyexit.training.records import read_records

MEASURED = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "completed", "total_output_tokens")


@dataclass(frozen=True)
class Server:
    """A running OpenAI-compatible server.

    Attributes:
        name: What results call it.
        url: Where it listens, without a path.
    """

    name: str
    url: str

    @classmethod
    def parse(cls, text: str) -> "Server":
        """Read NAME=URL.

        Raises:
            argparse.ArgumentTypeError: it is neither.
        """
        name, _, url = text.partition("=")
        if not name or not url.startswith(("http://", "https://")):
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=URL, as in plain=http://127.0.0.1:8000")
        return cls(name, url.rstrip("/"))


@dataclass(frozen=True)
class Load:
    """What every server is asked.

    Attributes:
        model: Name that the servers give the model.
        tokenizer: Folder or Hub id.
        dataset: JSON lines with ``prompt``, as ``vllm bench serve`` reads them.
        num_prompts: Lines of it to use.
        max_tokens: Longest answer.
    """

    model: str
    tokenizer: str
    dataset: Path
    num_prompts: int
    max_tokens: int

    def command(self, server: Server, concurrency: int, result: Path) -> list[str]:
        """Return the ``vllm bench serve`` that asks ``server`` greedily and writes ``result``."""
        options = {
            "--backend": "openai-chat",
            "--endpoint": "/v1/chat/completions",
            "--base-url": server.url,
            "--model": self.tokenizer,
            "--served-model-name": self.model,
            "--dataset-name": "custom",
            "--dataset-path": self.dataset,
            "--num-prompts": self.num_prompts,
            "--custom-output-len": self.max_tokens,
            "--max-concurrency": concurrency,
            "--temperature": 0,
            "--percentile-metrics": "ttft,tpot",
            "--result-dir": result.parent,
            "--result-filename": result.name,
        }
        flags = ["--skip-chat-template", "--disable-shuffle", "--save-result", "--disable-tqdm"]
        given = [str(part) for pair in options.items() for part in pair]
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", *given, *flags]


def ask(server: Server, load: Load, concurrency: int) -> dict[str, Any]:
    """Run ``vllm bench serve`` once; return its result.

    Raises:
        SystemExit: it failed, or a request did; the message ends with what it printed last.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(load.command(server, concurrency, result), capture_output=True, text=True)
        if done.returncode or not result.exists():
            raise SystemExit(f"vllm bench serve failed on {server.name} at {server.url}: {done.stderr[-2000:]}")
        measured = json.loads(result.read_text())
    if measured["completed"] != load.num_prompts:
        raise SystemExit(f"{server.name} answered {measured['completed']} of {load.num_prompts} requests")
    return measured


def record(server: Server, load: Load, concurrency: int, runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> Any:
    """Return one record of results.json: medians over a server's runs, and its raw speeds."""
    speeds = [run["output_throughput"] for run in runs]
    ratios = [speed / other["output_throughput"] for speed, other in zip(speeds, base, strict=True)]
    rates = [run["spec_decode_acceptance_rate"] for run in runs if "spec_decode_acceptance_rate" in run]
    return {
        "server": server.name,
        "model": load.model,
        "concurrency": concurrency,
        "num_prompts": load.num_prompts,
        "max_tokens": load.max_tokens,
        **{name: round(statistics.median(run[name] for run in runs), 3) for name in MEASURED},
        "speedup": round(statistics.median(ratios), 3),
        "acceptance_rate": round(statistics.median(rates) / 100, 4) if rates else None,
        "repeats": [round(speed, 2) for speed in speeds],
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve")
    parser.add_argument(
        "servers", type=Server.parse, nargs="+", help="NAME=URL of running servers, the baseline first."
    )
    parser.add_argument("--model", required=True, help="Folder or Hub id, for the tokenizer.")
    parser.add_argument("--served-model-name", help="What the servers call the model, if not --model.")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with turns; the first turn is asked.")
    parser.add_argument("--num-prompts", type=int, default=20, help="Evenly spread over the file.")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="Folder of results.json.")
    return parser.parse_args()


def main() -> None:
    """Ask all servers in turns and report medians."""
    options, console = parsed(), Console()
    prompts = spread([item["turns"][0] for item in read_records(options.prompts)], options.num_prompts)
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "prompts.jsonl"
        dataset.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        name = options.served_model_name or options.model
        load = Load(name, options.model, dataset, len(prompts), options.max_tokens)
        runs: dict[tuple[Server, int], list[dict[str, Any]]] = {}
        for server in options.servers:
            ask(server, load, 1)  # not counted
        rounds = [(repeat, width) for repeat in range(options.repeats) for width in options.concurrency]
        for repeat, width in track(rounds, description="asking", console=console):
            for server in options.servers if repeat % 2 == 0 else options.servers[::-1]:
                runs.setdefault((server, width), []).append(ask(server, load, width))
    records = [record(s, load, width, done, runs[options.servers[0], width]) for (s, width), done in runs.items()]
    source = provenance("python -m benchmarks.serve")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(
        json.dumps([r | {"provenance": source} for r in records], indent=1) + "\n"
    )
    columns = ("server", "concurrency", "output_throughput", "speedup", "median_ttft_ms", "median_tpot_ms")
    table = Table(*columns, "acceptance_rate")
    for item in records:
        table.add_row(*(str(item[name]) for name in (*columns, "acceptance_rate")))
    console.print(table)


if __name__ == "__main__":
    main()
