"""Tokens per second of self-exit, LayerSkip's rule, vLLM's own and transformers, launched with Ray.

    python -m benchmarks.throughput --model MODEL --prompts FILE.jsonl --num-prompts 20 --max-tokens 128
        --concurrency 1 8 --configs ar layerskip:8:3 self-exit --repeats 5 --out FOLDER

Every configuration is a Ray actor in a process of its own, but for draft lengths of the same rule, which share one.
On one machine the engines stay up and take turns through all repeats, some steps at a time (``--slice``), so that a
noisy machine is equally unkind to all of them; with ``--ray-address`` actors spread over a cluster's nodes. Writes
results.json, a list of records, and pictures beside it.
"""

import argparse
import json
import math
import os
import re
import statistics
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.engines import Run, Setup, adjust, build, family, finished, speculative_config
from benchmarks.pictures import acceptance_by_position, speed_against_concurrency, time_split
from vllm_earlyexit.demo import cpu_environment
from vllm_earlyexit.heads.fingerprint import model_folder, text_config
from vllm_earlyexit.provenance import accelerator_name, provenance
from vllm_earlyexit.training.records import read_records

T = TypeVar("T")
WARM_UP = 2
ENGINES_MEMORY = 0.85
"""Share of an accelerator's memory that all engines take together; never tried on one."""
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray listens on all interfaces, whatever ``_node_ip_address`` says, unless this says no before it is imported."""


class Contestant:
    """One configuration's engine, as a Ray actor; it also stands for the same configuration with shorter drafts."""

    def __init__(self, config: str, setup: Setup, prompts: list[str]):
        started = time.perf_counter()
        self._engine, self._prompts = build(config, setup), prompts
        self._start = time.perf_counter() - started
        self._running: Generator[None, None, Run]
        finished(self._engine.running(prompts[:WARM_UP], 1))

    def start_seconds(self) -> float:
        """Return how long the engine took to start; what vLLM's compilation cache had is not compiled again."""
        return self._start

    def begin(self, concurrency: int, changed: int | float | None, split: bool = False) -> None:
        """Start to answer all prompts, with another draft length (int) or accuracy of early exits (float) if given."""
        adjust(self._engine, changed)
        self._running = self._engine.running(self._prompts, concurrency, split)

    def go_on(self, seconds: float) -> Run | None:
        """Answer for so long; return what came of all if that is the end."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            try:
                next(self._running)
            except StopIteration as done:
                return done.value
        return None


def spread(items: list[T], number: int) -> list[T]:
    """Return so many of the items, evenly spread over a file that may be sorted by kind."""
    number = min(number, len(items))
    return [items[n * len(items) // number] for n in range(number)]


def setup_of(options: argparse.Namespace, max_num_seqs: int) -> Setup:
    """Return what all configurations share, by a benchmark's options."""
    return Setup(
        str(Path(options.model).resolve()) if Path(options.model).exists() else options.model,
        str(Path(options.heads).resolve()) if options.heads else None,
        options.dtype,
        not options.enforce_eager,
        options.max_tokens,
        max_num_seqs,
        options.max_model_len,
    )


def turns(configs: list[str], concurrencies: list[int], repeats: int) -> Iterator[tuple[int, list[str]]]:
    """Yield concurrency and the configurations that take turns, in their order, which is reversed every other time.

    Configurations that share an engine cannot take turns within a run; then they all run one after the other.
    """
    for repeat in range(repeats):
        for concurrency in concurrencies:
            able = [config for config in configs if concurrency == 1 or not config.startswith("transformers")]
            able = able if repeat % 2 == 0 else able[::-1]
            if len({family(config)[0] for config in able}) == len(able):
                yield concurrency, able
            else:
                yield from ((concurrency, [config]) for config in able)


def take_turns(contestants: dict[str, Any], configs: list[str], concurrency: int, seconds: float) -> dict[str, Run]:
    """Let configurations answer all prompts, so many seconds at a time if there are several."""
    import ray

    for config in configs:
        ray.get(contestants[config].begin.remote(concurrency, family(config)[1]))
    runs, seconds = dict[str, Run](), seconds if seconds and len(configs) > 1 else math.inf
    while len(runs) < len(configs):
        for config in configs:
            if config not in runs and (run := ray.get(contestants[config].go_on.remote(seconds))) is not None:
                runs[config] = run
    return runs


def split_run(contestant: Any, config: str) -> Run:
    """Let a configuration answer all prompts one at a time, and take its steps' times apart."""
    import ray

    ray.get(contestant.begin.remote(1, family(config)[1], split=True))
    return ray.get(contestant.go_on.remote(math.inf))


def record(
    setup: Setup, prompts: Path, config: str, concurrency: int, runs: list[Run], plain: list[Run] | None, alone: Run
) -> dict[str, Any]:
    """Return one record of results.json from all repeats of a configuration at a concurrency.

    Args:
        setup: What all configurations share.
        prompts: Their file.
        config: The configuration.
        concurrency: Requests at a time.
        runs: Its repeats.
        plain: Plain decoding's at the same concurrency; None if this is plain decoding.
        alone: A plain run at the smallest concurrency: that plain outputs differ from its shows what rounding does.
    """
    speeds = [run.tokens / run.seconds for run in runs]
    ratios = [speed / (base.tokens / base.seconds) for speed, base in zip(speeds, plain or [], strict=bool(plain))]
    first = runs[0]
    drafted, accepted = sum(run.drafted for run in runs), sum(run.accepted for run in runs)
    drafts = sum(run.drafts for run in runs)
    speed = statistics.median(speeds)
    same = [a == b for a, b in zip(first.outputs, plain[0].outputs, strict=True)] if plain else []
    as_alone = sum(a == b for a, b in zip(first.outputs, alone.outputs, strict=True))
    return {
        "config": config,
        "model": Path(setup.model).name,
        "dtype": setup.dtype,
        "compiled": setup.compiled and not config.startswith("transformers"),
        "concurrency": concurrency,
        "prompts": prompts.name,
        "num_prompts": len(first.outputs),
        "tokens_per_s": round(speed, 2),
        "ms_per_token": round(1000 / speed, 3),
        "speedup_vs_ar": round(statistics.median(ratios), 3) if ratios else None,
        "acceptance_rate": round(accepted / drafted, 4) if drafted else None,
        "acceptance_length": round(1 + accepted / drafts, 3) if drafts else None,
        "drafted": drafted,
        "accepted": accepted,
        "accepted_at": [sum(at) for at in zip(*(run.accepted_at for run in runs), strict=True)],
        "drafts": drafts,
        "predicted_over_measured_seconds": _predicted(runs),
        "early_exits": early_exits(first, setup),
        "identical_outputs": sum(same) if plain else None,
        "identical_to_plain_at_smallest_concurrency": as_alone,
        "repeats": [round(value, 2) for value in speeds],
        "ratios": [round(value, 3) for value in ratios],
    }


def early_exits(run: Run, setup: Setup) -> dict[str, float] | None:
    """Return shares of tokens that left early and, of these, agreed and were promised to, and what else is known.

    That is how many left though their requests wanted more of the head, and the mean layer that decided a token. None
    if nothing may leave.
    """
    counts = run.early
    decided = counts.get("early_tokens", 0) + counts.get("full_depth_tokens", 0)
    if not decided:
        return None
    layers = text_config(model_folder(setup.model))["num_hidden_layers"]
    by_layer = {
        int(name.rpartition("_")[2]): n for name, n in counts.items() if re.fullmatch(r"early_tokens_\d+", name)
    }
    depth = sum(layer * n for layer, n in by_layer.items()) + layers * counts.get("full_depth_tokens", 0)
    found = {
        "early": round(counts.get("early_tokens", 0) / decided, 4),
        "involuntary": counts.get("involuntary_early_tokens", 0),
        "mean_exit_depth": round(depth / decided, 2),
    }
    if counts.get("checked_tokens"):
        found["agreement"] = round(counts["agreed_tokens"] / counts["checked_tokens"], 4)
        found["promised"] = round(counts["promised_tokens"] / counts["checked_tokens"], 4)
    return found


def _predicted(runs: list[Run]) -> float | None:
    """Return what the cost model expected rounds to take over what they took; None if there is none."""
    measured = sum(run.measured for run in runs)
    return round(sum(run.predicted for run in runs) / measured, 3) if measured else None


def start(configs: list[str], setup: Setup, prompts: list[str], address: str | None) -> dict[str, Any]:
    """Start actors one after the other and return them by configuration; configurations of a family share one."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    local: dict[str, Any] = {"include_dashboard": False, "num_cpus": len(configs)}
    ray.init(address=address, log_to_driver=False, **({} if address else local))
    wanted = ("LD_PRELOAD", "VLLM_", "HF_HUB_OFFLINE", "PYTHONPATH")
    environment = {key: value for key, value in cpu_environment().items() if key.startswith(wanted)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))  # Ray would set it to num_cpus
    placed: dict[str, Any] = {"scheduling_strategy": "SPREAD"} if address else {}
    if accelerator_name():
        share = 1 / len({family(config)[0] for config in configs})
        placed |= {"num_gpus": share}
        setup = replace(setup, memory_share=ENGINES_MEMORY * share)
    actor = ray.remote(Contestant).options(num_cpus=1, runtime_env={"env_vars": environment}, **placed)
    engines: dict[str, Any] = {}
    for config in sorted(configs, key=lambda name: -(family(name)[1] or 0)):  # the longest drafts' engine serves all
        if family(config)[0] not in engines:
            engines[family(config)[0]] = started = actor.remote(config, setup, prompts)
            ray.get(started.__ray_ready__.remote())
    return {config: engines[family(config)[0]] for config in configs}


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options; by default this process's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput")
    parser.add_argument("--model", required=True, help="Folder or Hub id.")
    parser.add_argument("--heads", help="Folder of exit heads; by default the shipped ones.")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with turns; the first turn is asked.")
    parser.add_argument("--num-prompts", type=int, default=20, help="Evenly spread over the file.")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--min-tokens",
        type=int,
        help="Cut answers off at lengths from here to --max-tokens, each prompt's at its own, so that requests do not "
        "begin and end together; by default all at --max-tokens.",
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1], help="Requests at a time.")
    parser.add_argument(
        "--configs",
        nargs="+",
        default=["ar", "self-exit"],
        help="ar, ar-sync, undrafted, unpadded, self-exit[:LAYER], heads-only[:LAYER], entropy, fixed:LAYER:LENGTH, "
        "layerskip[:LAYER:LENGTH], ngram:MIN:LENGTH, early:FILL:ACCURACY, early-heads:FILL:ACCURACY, oracle:FILL, "
        "depth:LAYERS, eagle3:LENGTH:HEAD, transformers:LAYER.",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--slice",
        type=float,
        default=0.5,
        help="Seconds at a time within a run, if no two configurations share an engine; 0 for whole runs.",
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--ray-address", help="Of a running cluster; by default one is started on this machine.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of results.json and pictures.")
    return parser.parse_args(arguments)


def main() -> None:
    """Run every configuration at every concurrency, in turns, and report medians."""
    options, console = parsed(), Console()
    if options.ray_address is None:
        os.environ[LOOPBACK] = "0"
    import ray

    if options.min_tokens is not None and not 1 <= options.min_tokens <= options.max_tokens:
        raise SystemExit("--min-tokens must be 1 to --max-tokens")
    setup = replace(setup_of(options, max(options.concurrency)), min_tokens=options.min_tokens)
    configs: list[str] = options.configs
    for name in configs:
        if not name.startswith("transformers"):
            try:
                speculative_config(name, setup)
            except ValueError as error:
                raise SystemExit(str(error)) from None
    asked = spread([item["turns"][0] for item in read_records(options.prompts)], options.num_prompts)
    runs: dict[tuple[str, int], list[Run]] = {}
    try:
        console.print(f"starting {', '.join(configs)} …")
        contestants = start(configs, setup, asked, options.ray_address)
        starts = {name: round(ray.get(one.start_seconds.remote()), 1) for name, one in contestants.items()}
        schedule = list(turns(configs, options.concurrency, options.repeats))
        with Progress(console=console) as progress:
            bar = progress.add_task("running", total=len(schedule))
            for width, names in schedule:
                for name, run in take_turns(contestants, names, width, options.slice).items():
                    runs.setdefault((name, width), []).append(run)
                progress.advance(bar)
                write(options.out, setup, options.prompts, runs, {}, starts)
        split = configs if 1 in options.concurrency else []
        ours = [name for name in split if not name.startswith(("transformers", "ngram", "eagle3"))]
        splits = {name: split_run(contestants[name], name) for name in ours}
    finally:
        ray.shutdown()
    records = write(options.out, setup, options.prompts, runs, splits, starts)
    console.print(_table(records))
    speed_against_concurrency(records, options.out / "speed.png")
    acceptance_by_position(records, options.out / "acceptance.png")
    if splits:
        time_split(records, options.out / "time-split.png")


def write(
    out: Path,
    setup: Setup,
    prompts: Path,
    runs: dict[tuple[str, int], list[Run]],
    splits: dict[str, Run],
    starts: dict[str, float],
) -> list[dict[str, Any]]:
    """Write results.json from all runs that have their plain counterpart; return its records."""
    records, source = [], provenance("python -m benchmarks.throughput")
    for (name, width), done in runs.items():
        plain = runs.get(("ar", width), [])
        if name != "ar" and 0 < len(plain) < len(done):
            continue
        alone = runs.get(("ar", min(width for _, width in runs)), done)[0]
        item = record(setup, prompts, name, width, done, plain[: len(done)] if name != "ar" else None, alone)
        item["start_seconds"] = starts.get(name)
        if width == 1 and (split := splits.get(name)):
            spent = split.split | {"engine": split.seconds - sum(split.split.values())}
            item["ms_per_token_by_part"] = {part: round(1000 * s / split.tokens, 3) for part, s in spent.items()}
        records.append(item | {"provenance": source})
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    return records


def _table(records: list[dict[str, Any]]) -> Table:
    table = Table("configuration", "concurrency", "tokens/s", "x plain", "acceptance", "length", "identical")
    for item in records:
        table.add_row(
            item["config"],
            str(item["concurrency"]),
            f"{item['tokens_per_s']:.1f}",
            "" if item["speedup_vs_ar"] is None else f"{item['speedup_vs_ar']:.2f}",
            "" if item["acceptance_rate"] is None else f"{item['acceptance_rate']:.0%}",
            "" if item["acceptance_length"] is None else f"{item['acceptance_length']:.2f}",
            "" if item["identical_outputs"] is None else f"{item['identical_outputs']}/{item['num_prompts']}",
        )
    return table


if __name__ == "__main__":
    main()
