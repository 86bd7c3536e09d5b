"""Tokens per second of self-exit, LayerSkip's rule, vLLM's own and transformers, launched with Ray.

    python -m benchmarks.throughput --model MODEL --prompts FILE.jsonl --num-prompts 20 --max-tokens 128
        --concurrency 1 8 --configs ar layerskip:8:3 self-exit --repeats 5 --out FOLDER

Every configuration is an engine in a process of its own, but for draft lengths of the same rule, which share one. First
each is started, measured and ended alone. Then all are started and take turns, a whole pass over the prompts each, and
all others are stopped meanwhile. Where medians of the two differ by more than 5 %, nothing is reported: results.json
says so, there is neither table nor picture, and the exit status is 1.

The baseline is plain vLLM, compiled, in the faster of bfloat16 and float32 at each concurrency (``--dtype auto``). With
``--ray-address`` engines spread over a cluster's nodes. Writes results.json, a list of records, and pictures beside it.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.contestant import Host
from benchmarks.engines import DTYPES, Run, Setup, family, named_dtype, speculative_config
from benchmarks.pictures import acceptance_by_position, speed_against_concurrency, time_split
from benchmarks.progress import progress_on, say
from benchmarks.proof import doubted, proof
from vllm_earlyexit.heads.fingerprint import model_folder, text_config
from vllm_earlyexit.provenance import accelerator_name, provenance
from vllm_earlyexit.training.records import read_records

T = TypeVar("T")
AUTO = "auto"
ENGINES_MEMORY = 0.85
"""Share of an accelerator's memory that all engines take together; never tried on one."""
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray listens on all interfaces, whatever ``_node_ip_address`` says, unless this says no before it is imported."""
Runs = dict[tuple[str, int], list[Run]]
"""By configuration and concurrency."""


@dataclass
class Measured:
    """What has been measured so far.

    Attributes:
        setup: What all configurations share, with the dtype of those that name none.
        prompts: Their file.
        alone: Passes of each engine with no other one started.
        turns: Passes in turns, in the order of repeats.
        splits: A pass each at one request at a time, with the time that parts of a step took.
        starts: Seconds that engines took to start.
    """

    setup: Setup
    prompts: Path
    alone: Runs = field(default_factory=dict)
    turns: Runs = field(default_factory=dict)
    splits: dict[str, Run] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)

    def dtype(self, config: str) -> str:
        """Return the dtype that a configuration runs in."""
        return named_dtype(config)[1] or self.setup.dtype

    def baseline(self, concurrency: int) -> str:
        """Return the configuration of plain vLLM that is fastest alone."""
        plain = [name for name, width in self.alone if is_plain(name) and width == concurrency]
        return max(plain, key=lambda name: statistics.median(rates(self.alone[name, concurrency])))

    def plain_like(self, config: str, concurrency: int) -> Run | None:
        """Return a pass of plain vLLM in the dtype of a configuration; None if there was none."""
        found = (
            runs[0]
            for (name, width), runs in self.alone.items()
            if is_plain(name) and width == concurrency and self.dtype(name) == self.dtype(config)
        )
        return next(found, None)


def is_plain(config: str) -> bool:
    """Return whether a configuration is plain vLLM, in whichever dtype."""
    return named_dtype(config)[0] == "ar"


def rates(runs: list[Run]) -> list[float]:
    """Return the tokens per second of passes."""
    return [run.tokens / run.seconds for run in runs]


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


def contenders(configs: list[str], dtype: str) -> list[str]:
    """Return the configurations to measure: plain vLLM, in each dtype that may be its fastest, then the others."""
    plain = [f"ar@{name}" for name in DTYPES] if dtype == AUTO else ["ar"] * (f"ar@{dtype}" not in configs)
    return list(dict.fromkeys([*plain, *(config for config in configs if config != "ar")]))


def able(configs: list[str], concurrency: int) -> list[str]:
    """Return the configurations that can be measured at a concurrency: transformers answers one request at a time."""
    return [config for config in configs if concurrency == 1 or not config.startswith("transformers")]


def turns(configs: list[str], concurrencies: list[int], repeats: int) -> Iterator[tuple[int, int, list[str]]]:
    """Yield repeat, concurrency and the configurations in the order of their turns, reversed every other repeat."""
    for repeat in range(repeats):
        for concurrency in concurrencies:
            yield repeat, concurrency, able(configs, concurrency)[:: 1 if repeat % 2 == 0 else -1]


def record(measured: Measured, config: str, concurrency: int) -> dict[str, Any]:
    """Return one record of results.json from all passes of a configuration at a concurrency.

    ``identical_outputs`` are relative to plain vLLM in the same dtype at the same concurrency, in the first repeat;
    that plain outputs at another concurrency differ shows what rounding does. Without turns it has its rates alone.
    """
    alone, runs = measured.alone[config, concurrency], measured.turns.get((config, concurrency), [])
    setup, baseline = measured.setup, measured.baseline(concurrency)
    speeds, first = rates(runs), (runs or alone)[0]
    ratios = []
    if runs and config != baseline:
        base = rates(measured.turns[baseline, concurrency])
        ratios = [speed / other for speed, other in zip(speeds, base, strict=True)]
    drafted, accepted = sum(run.drafted for run in runs), sum(run.accepted for run in runs)
    drafts = sum(run.drafts for run in runs)
    speed = statistics.median(speeds) if speeds else None
    smallest = min(width for name, width in measured.alone if name == config)
    found = {
        "config": config,
        "baseline": baseline,
        "model": Path(setup.model).name,
        "dtype": measured.dtype(config),
        "compiled": setup.compiled and not config.startswith("transformers"),
        "prefix_caching": setup.prefix_caching,
        "context_tokens": setup.context,
        "concurrency": concurrency,
        "prompts": measured.prompts.name,
        "num_prompts": len(first.outputs),
        "tokens_per_s": round(speed, 2) if speed else None,
        "ms_per_token": round(1000 / speed, 3) if speed else None,
        "speedup_vs_ar": round(statistics.median(ratios), 3) if ratios else None,
        "acceptance_rate": round(accepted / drafted, 4) if drafted else None,
        "acceptance_length": round(1 + accepted / drafts, 3) if drafts else None,
        "drafted": drafted,
        "accepted": accepted,
        "accepted_at": [sum(at) for at in zip(*(run.accepted_at for run in runs), strict=True)],
        "drafts": drafts,
        "predicted_over_measured_seconds": _predicted(runs),
        "early_exits": early_exits(first, setup),
        "identical_outputs": None if is_plain(config) else same(first, measured.plain_like(config, concurrency)),
        "identical_to_plain_at_smallest_concurrency": same(first, measured.plain_like(config, smallest)),
        "repeats": [round(value, 2) for value in speeds],
        "ratios": [round(value, 3) for value in ratios],
        **proof(speeds, rates(alone)),
        "start_seconds": measured.starts.get(family(config)[0]),
    }
    if concurrency == 1 and (split := measured.splits.get(config)):
        spent = split.split | {"engine": split.seconds - sum(split.split.values())}
        found["ms_per_token_by_part"] = {part: round(1000 * s / split.tokens, 3) for part, s in spent.items()}
    return found


def same(run: Run, other: Run | None) -> int | None:
    """Return how many outputs two passes have in common."""
    return None if other is None else sum(a == b for a, b in zip(run.outputs, other.outputs, strict=True))


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


def own_cores() -> dict[str, str]:
    """Return the environment of engines that run on this process's cores.

    Asked by an actor of Ray the system may name one core: OpenMP, preloaded, binds whoever starts Ray's processes.
    """
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "OMP_NUM_THREADS": str(len(cores))}


class Engines:
    """The engines, by family: each is a process on a node that Ray chose; see ``contestant.Host``.

    Args:
        configs: All configurations.
        setup: What they share.
        prompts: What they are asked.
        address: Of a running cluster; None to start one here.
    """

    def __init__(self, configs: list[str], setup: Setup, prompts: list[str], address: str | None):
        import ray

        self._ray, self._prompts = ray, prompts
        self.families: dict[str, list[str]] = {}
        for config in configs:
            self.families.setdefault(family(config)[0], []).append(config)
        os.environ.setdefault("RAY_worker_niceness", "0")
        local: dict[str, Any] = {"include_dashboard": False, "num_cpus": len(self.families)}
        ray.init(address=address, log_to_driver=False, **({} if address else local))
        own = {} if address else own_cores()
        passed = {key: value for key, value in os.environ.items() if key.startswith(("LD_PRELOAD", "VLLM_", "HF_HUB_"))}
        path = [str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = own | passed | {"PYTHONPATH": os.pathsep.join(path)}
        placed: dict[str, Any] = {"scheduling_strategy": "SPREAD"} if address else {}
        self._shared: dict[str, Any] = {}
        if accelerator_name():
            placed |= {"num_gpus": 1 / len(self.families)}
            self._shared = {"memory_share": ENGINES_MEMORY / len(self.families)}
        actor = ray.remote(Host).options(num_cpus=1, runtime_env={"env_vars": environment}, **placed)
        self._hosts = {name: actor.remote() for name in self.families}
        for host in self._hosts.values():
            ray.get(host.__ray_ready__.remote())

    def start(self, name: str, setup: Setup) -> float:
        """Start a family's engine, with the longest drafts of all of its configurations, and return the seconds."""
        config = max(self.families[name], key=lambda config: family(config)[1] or 0)
        host = self._hosts[name]
        return round(self._done(host.start.remote(config, replace(setup, **self._shared), self._prompts)), 1)

    def run(self, config: str, concurrency: int, passes: int = 1, split: bool = False) -> list[Run]:
        """Give a configuration its turn; see ``Host.run``."""
        name, changed = family(config)
        return self._done(self._hosts[name].run.remote(concurrency, changed, passes, split))

    def stop(self, name: str) -> None:
        """End a family's engine, if it was started."""
        self._done(self._hosts[name].stop.remote())

    def _done(self, task: Any) -> Any:
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            raise SystemExit(str(error.cause)) from None

    def close(self) -> None:
        """End everything."""
        try:
            for name in self._hosts:
                self.stop(name)
        finally:
            self._ray.shutdown()


def measure_alone(
    engines: Engines, names: list[str], measured: Measured, options: argparse.Namespace, progress: Progress
) -> None:
    """Measure families one after the other, with no other engine started."""
    bar = progress.add_task("", total=len(names))
    for name in names:
        say(progress, bar, f"alone: starting {name}")
        measured.starts[name] = engines.start(name, measured.setup)
        for concurrency in options.concurrency:
            for config in able(engines.families[name], concurrency):
                say(progress, bar, f"alone: {config} at {concurrency}")
                measured.alone[config, concurrency] = engines.run(config, concurrency, options.alone_repeats)
        engines.stop(name)
        progress.advance(bar)
    progress.update(bar, description="alone: " + ", ".join(names))


def measure_in_turns(
    engines: Engines, configs: list[str], measured: Measured, options: argparse.Namespace, progress: Progress
) -> None:
    """Start all engines that these configurations need, then measure in turns; write after each repeat."""
    names = list(dict.fromkeys(family(config)[0] for config in configs))
    bar = progress.add_task("", total=len(names))
    for name in names:
        say(progress, bar, f"in turns: starting {name}")
        engines.start(name, measured.setup)
        progress.advance(bar)
    progress.update(bar, description="in turns: started")
    schedule = list(turns(configs, options.concurrency, options.repeats))
    bar = progress.add_task("", total=sum(len(order) for _, _, order in schedule))
    for position, (repeat, concurrency, order) in enumerate(schedule):
        for config in order:
            say(progress, bar, f"in turns: repeat {repeat + 1}, {config} at {concurrency}")
            measured.turns.setdefault((config, concurrency), []).extend(engines.run(config, concurrency))
            progress.advance(bar)
        if position + 1 == len(schedule) or schedule[position + 1][0] != repeat:
            write(options.out, measured)
    progress.update(bar, description="in turns")
    if 1 in options.concurrency:
        split = [name for name in configs if not name.startswith(("transformers", "ngram", "suffix", "eagle3"))]
        for config in progress.track(split, description="time by part"):
            (measured.splits[config],) = engines.run(config, 1, split=True)


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
    parser.add_argument(
        "--context-tokens",
        type=int,
        default=0,
        help="Lengthen prompts to so many tokens, with other prompts in front; by default they stay as they are.",
    )
    parser.add_argument("--prefix-caching", action="store_true", help="vLLM caches prefixes, from pass to pass.")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1], help="Requests at a time.")
    parser.add_argument(
        "--configs",
        nargs="+",
        default=["ar", "self-exit"],
        help="ar, ar-sync, undrafted, unpadded, self-exit[:LAYER], heads-only[:LAYER], entropy, fixed:LAYER:LENGTH, "
        "layerskip[:LAYER:LENGTH], ngram:MIN:LENGTH, suffix:LENGTH, early:FILL:ACCURACY, early-heads:FILL:ACCURACY, "
        "oracle:FILL, depth:LAYERS, eagle3:LENGTH:HEAD, transformers:LAYER; each may end with @bfloat16 or @float32. "
        "Plain vLLM (ar) is always measured.",
    )
    parser.add_argument("--repeats", type=int, default=5, help="Passes of each configuration in turns.")
    parser.add_argument("--alone-repeats", type=int, default=2, help="Passes of each configuration alone.")
    parser.add_argument(
        "--dtype",
        choices=[AUTO, *DTYPES],
        default=AUTO,
        help="Of configurations that name none; auto: whichever makes plain vLLM faster at the smallest concurrency.",
    )
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--ray-address", help="Of a running cluster; by default one is started on this machine.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of results.json and pictures.")
    return parser.parse_args(arguments)


def checked(options: argparse.Namespace) -> Setup:
    """Return what all configurations share.

    Raises:
        SystemExit: options do not go together, or there is no such configuration; one sentence says which.
    """
    if min(options.repeats, options.alone_repeats, options.num_prompts, *options.concurrency) < 1:
        raise SystemExit("--repeats, --alone-repeats, --num-prompts and --concurrency must be at least 1")
    if options.min_tokens is not None and not 1 <= options.min_tokens <= options.max_tokens:
        raise SystemExit("--min-tokens must be 1 to --max-tokens")
    if options.context_tokens and options.context_tokens + options.max_tokens > options.max_model_len:
        raise SystemExit("--context-tokens and --max-tokens together must be at most --max-model-len")
    if options.context_tokens and options.num_prompts < 2:
        raise SystemExit("--context-tokens takes its tokens from other prompts: --num-prompts must be at least 2")
    setup = setup_of(options, max(options.concurrency))
    more = {"prefix_caching": options.prefix_caching, "context": options.context_tokens}
    setup = replace(setup, min_tokens=options.min_tokens, **more)
    for config in options.configs:
        name, _ = named_dtype(config)
        if re.fullmatch(r"transformers:\d+", name):
            continue
        try:
            speculative_config(name, setup)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        if name.startswith("suffix") and not options.ray_address and not importlib.util.find_spec("arctic_inference"):
            raise SystemExit(f"{config} needs vLLM's suffix decoding: pip install arctic-inference")
    return setup


def main() -> None:
    """Measure every configuration at every concurrency, alone and in turns, and report medians if these agree."""
    options, console = parsed(), Console()
    setup = checked(options)
    options.concurrency = list(dict.fromkeys(options.concurrency))
    if options.ray_address is None:
        os.environ[LOOPBACK] = "0"
    asked = spread([item["turns"][0] for item in read_records(options.prompts)], options.num_prompts)
    configs = contenders(options.configs, options.dtype)
    measured = Measured(setup, options.prompts)
    console.print("starting Ray …")
    engines = Engines(configs, setup, asked, options.ray_address)
    try:
        with progress_on(console) as progress:
            plain = [name for name in engines.families if is_plain(name)]
            measure_alone(engines, plain, measured, options, progress)
            if options.dtype == AUTO:
                fastest = measured.baseline(min(options.concurrency))
                measured.setup = replace(setup, dtype=measured.dtype(fastest))
            others = [name for name in engines.families if name not in plain]
            measure_alone(engines, others, measured, options, progress)
            baselines = {measured.baseline(concurrency) for concurrency in options.concurrency}
            taking = [config for config in configs if not is_plain(config) or config in baselines]
            measure_in_turns(engines, taking, measured, options, progress)
    finally:
        engines.close()
    records = write(options.out, measured)
    if doubted(records, "config", "tokens_per_s", console):
        raise SystemExit(1)
    console.print(_table(records))
    speed_against_concurrency(records, options.out / "speed.png")
    acceptance_by_position(records, options.out / "acceptance.png")
    if measured.splits:
        time_split(records, options.out / "time-split.png")


def write(out: Path, measured: Measured) -> list[dict[str, Any]]:
    """Write results.json from all that was measured; return its records."""
    source = provenance("python -m benchmarks.throughput")
    records = [record(measured, *key) | {"provenance": source} for key in measured.alone]
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    return records


def _table(records: list[dict[str, Any]]) -> Table:
    table = Table("configuration", "concurrency", "tokens/s", "alone", "x plain", "acceptance", "length", "identical")
    for item in records:
        speedup = 1.0 if item["config"] == item["baseline"] else item["speedup_vs_ar"]
        table.add_row(
            item["config"],
            str(item["concurrency"]),
            "" if item["tokens_per_s"] is None else f"{item['tokens_per_s']:.1f}",
            f"{item['alone_tokens_per_s']:.1f}",
            "" if speedup is None else f"{speedup:.2f}",
            "" if item["acceptance_rate"] is None else f"{item['acceptance_rate']:.0%}",
            "" if item["acceptance_length"] is None else f"{item['acceptance_length']:.2f}",
            "" if item["identical_outputs"] is None else f"{item['identical_outputs']}/{item['num_prompts']}",
        )
    return table


if __name__ == "__main__":
    main()
