"""The demo: plain and self-exit vLLM in turns, pass by pass over the same prompts."""

import json
import os
import statistics
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_earlyexit import turns
from vllm_earlyexit.assets import DEMO_PROMPTS
from vllm_earlyexit.embedded import smollm2
from vllm_earlyexit.provenance import accelerator_name, provenance
from vllm_earlyexit.training.records import read_records

WARM_UP = "Say hello."
REPEATS = 3


def cpu_environment() -> dict[str, str]:
    """Return this process's environment with what vLLM's CPU documentation advises, unless set by the user."""
    advised = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in sorted(os.sched_getaffinity(0))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    openmp = Path(sysconfig.get_paths()["data"]) / "lib" / "libiomp5.so"
    if openmp.exists():
        advised["LD_PRELOAD"] = str(openmp)
    return advised | dict(os.environ)


class Engine:
    """A vLLM engine in a process of its own, answering one prompt at a time; paused unless it is its turn.

    Attributes:
        seconds: Time spent generating in each pass, warm-ups excluded.
        outputs: Generated token ids, one list per prompt, of each pass.
        counts: ``drafts``, ``drafted`` and ``accepted`` of all passes.

    Args:
        name: What messages call it.
        arguments: For ``LLM``, with ``max_tokens``.
        log: Where its output goes.
    """

    def __init__(self, name: str, arguments: dict[str, Any], log: Path):
        self.name, self.seconds, self.outputs = name, list[float](), list[list[list[int]]]()
        self.counts = Counter[str]()
        command = [sys.executable, "-m", "vllm_earlyexit.demo", json.dumps(arguments)]
        self._child = turns.Child(name, command, log, cpu_environment())

    def warm_up(self) -> None:
        """Wait until it has answered a first prompt; then it is paused."""
        self._child.ask(WARM_UP)
        self._child.pause()

    def answer(self, prompts: list[str], progress: Progress) -> None:
        """Answer all prompts in one turn, after one that does not count."""
        bar = progress.add_task(f"{self.name}, pass {len(self.seconds) + 1} of {REPEATS}", total=len(prompts))
        with self._child.turn():
            before = last = self._child.ask(WARM_UP)
            self.seconds.append(0.0)
            self.outputs.append([])
            for prompt in prompts:
                last = self._child.ask(prompt)
                self.seconds[-1] += last["seconds"]
                self.outputs[-1].append(last["tokens"])
                progress.advance(bar)
        self.counts.update({name: last[name] - before[name] for name in ("drafts", "drafted", "accepted")})

    def tokens(self) -> list[int]:
        """Return how many tokens each pass has generated."""
        return [sum(map(len, outputs)) for outputs in self.outputs]

    def speeds(self) -> list[float]:
        """Return the tokens per second of each pass."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens(), self.seconds, strict=True)]

    def stop(self) -> None:
        """End the process."""
        self._child.stop(patience=30)


def serve_prompts(arguments: dict[str, Any]) -> None:
    """Run one engine that answers prompts (the child process of the demo)."""
    from vllm import LLM, SamplingParams

    max_tokens = arguments.pop("max_tokens")
    llm = LLM(**arguments, disable_log_stats=False)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    for prompt in turns.questions():
        start = time.perf_counter()
        messages: list[Any] = [{"role": "user", "content": prompt}]
        output = llm.chat(messages, params, use_tqdm=False)[0].outputs[0]
        turns.answer({"tokens": list(output.token_ids), "seconds": time.perf_counter() - start} | _speculation(llm))


def _speculation(llm: Any) -> dict[str, int]:
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    prefix = "vllm:spec_decode_num_"
    return {
        "drafts": int(values.get(f"{prefix}drafts", 0)),
        "drafted": int(values.get(f"{prefix}draft_tokens", 0)),
        "accepted": int(values.get(f"{prefix}accepted_tokens", 0)),
    }


def compare(plain: Engine, self_exit: Engine, dtype: str) -> dict[str, Any]:
    """Return what demo.json holds: counts, medians of speeds, acceptance, with the provenance of the run."""
    tokens, counts = sum(self_exit.tokens()), self_exit.counts
    ratios = [ours / base for ours, base in zip(self_exit.speeds(), plain.speeds(), strict=True)]
    return {
        "prompts": len(plain.outputs[0]),
        "repeats": len(ratios),
        "identical": sum(a == b for a, b in zip(plain.outputs[0], self_exit.outputs[0], strict=True)),
        "dtype": dtype,
        "ar_tokens_per_s": round(statistics.median(plain.speeds()), 2),
        "self_exit_tokens_per_s": round(statistics.median(self_exit.speeds()), 2),
        "speedup": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "acceptance_rate": round(counts["accepted"] / max(1, counts["drafted"]), 4),
        "acceptance_length": round(1 + counts["accepted"] / max(1, counts["drafts"]), 3),
        "tokens_per_step": round(tokens / (tokens - counts["accepted"]), 3),
        "drafted": counts["drafted"],
        "accepted": counts["accepted"],
        "provenance": provenance(),
    }


def fast_dtype() -> str:
    """Return in which dtype plain vLLM is likely faster here: bfloat16, unless the CPU would emulate it."""
    from vllm_earlyexit.training.teacher import compute_dtype

    return str(compute_dtype("cuda" if accelerator_name() else "cpu")).removeprefix("torch.")


def run_demo(build: Path, *, dtype: str, num_prompts: int, max_tokens: int, enforce_eager: bool) -> dict[str, Any]:
    """Run the demo, print its table, write ``build/demo.json``, and return its content.

    The two engines take turns pass by pass, the other one stopped, in an order that alternates.
    """
    console = Console()
    build.mkdir(parents=True, exist_ok=True)
    console.print("unpacking SmolLM2-135M-Instruct …")
    model = smollm2(build / "smollm2-135m-instruct")
    prompts = [record["turns"][0] for record in read_records(DEMO_PROMPTS)][:num_prompts]
    dtype = fast_dtype() if dtype == "auto" else dtype
    common = {
        "model": str(model),
        "dtype": dtype,
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "max_tokens": max_tokens,
        "enforce_eager": enforce_eager,
    }
    asked = {"plain": common, "self-exit": {**common, "speculative_config": {"method": "self_exit"}}}
    engines: list[Engine] = []
    try:
        for name, arguments in asked.items():
            console.print(f"starting the {name} engine …" + ("" if enforce_eager else " (compiles the first time)"))
            engines.append(Engine(name, arguments, build / f"demo-{name}.log"))
            engines[-1].warm_up()
        with Progress(console=console, refresh_per_second=1) as progress:
            for repeat in range(REPEATS):
                for engine in engines if repeat % 2 == 0 else engines[::-1]:
                    engine.answer(prompts, progress)
    finally:
        for engine in engines:
            engine.stop()
    plain, self_exit = engines
    result = compare(plain, self_exit, dtype)
    (build / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(_table(result, model.name))
    console.print(f"written to {build / 'demo.json'}")
    return result


def _table(result: dict[str, Any], model: str) -> Table:
    table = Table(
        "",
        "plain vLLM",
        "self-exit",
        title=f"{model}, {result['dtype']}, {result['prompts']} prompts, batch 1, medians",
    )
    table.add_row(
        "tokens/s", str(result["ar_tokens_per_s"]), f"{result['self_exit_tokens_per_s']} ({result['speedup']} x)"
    )
    table.add_row("acceptance rate", "", f"{result['acceptance_rate']:.1%}")
    table.add_row("acceptance length", "1", str(result["acceptance_length"]))
    table.add_row("tokens per step", "1", str(result["tokens_per_step"]))
    table.add_row("identical outputs", "", f"{result['identical']} of {result['prompts']}")
    return table


if __name__ == "__main__":
    serve_prompts(json.loads(sys.argv[1]))
