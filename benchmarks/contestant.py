"""An engine of the throughput benchmark in a process of its own, paused unless it is its turn.

``Host`` is what Ray places on a node. It only starts the engine's process and stops it for others' turns, because Ray
takes a process of its own that is stopped for dead.
"""

import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.engines import Run, Setup, adjust, build
from vllm_earlyexit import turns
from vllm_earlyexit.demo import cpu_environment

WARM_UP = 2
"""Prompts that are answered at least before what counts."""


def engine_environment() -> dict[str, str]:
    """Return this process's environment for an engine: as vLLM's CPU documentation advises, several side by side."""
    return cpu_environment() | {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")}


def claim_cores() -> None:
    """Let engines that this process starts have all cores, unless it was told which; see ``throughput.own_cores``.

    Ray has bound it to one, and has set the number of threads to its share.
    """
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the kernel takes out those that are not allowed
        os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))


class Host:
    """Has one engine on its node, which serves all configurations of a family."""

    def start(self, config: str, setup: Setup, prompts: list[str]) -> float:
        """Start the engine and pause it once it is warm; return how many seconds it took to build.

        What vLLM's compilation cache had is not compiled again.
        """
        self._prompts = len(prompts)
        self._folder = Path(tempfile.mkdtemp(prefix="throughput-"))
        claim_cores()
        environment = engine_environment()
        command = [sys.executable, "-m", "benchmarks.contestant"]
        self._child = turns.Child(config, command, self._folder / "engine.log", environment)
        seconds = self._child.ask({"config": config, "setup": asdict(setup), "prompts": prompts})
        self._child.pause()
        return seconds

    def run(self, concurrency: int, changed: int | float | None, passes: int = 1, split: bool = False) -> list[Run]:
        """Let the engine answer all prompts so many times, in one turn, after a warm-up that does not count.

        Args:
            concurrency: Requests at a time.
            changed: Its draft length (int) or accuracy of early exits (float); None if it has neither.
            passes: How many times.
            split: Whether to take its steps' times apart.
        """
        question = {
            "concurrency": concurrency,
            "changed": changed,
            "warm_up": min(self._prompts, max(WARM_UP, concurrency)),
            "passes": passes,
            "split": split,
        }
        with self._child.turn():
            return [Run(**run) for run in self._child.ask(question)]

    def stop(self) -> None:
        """End the engine, if there is one; what it has printed stays if it failed."""
        child: turns.Child | None = self.__dict__.pop("_child", None)
        if child is not None and child.stop() == 0:
            shutil.rmtree(self._folder)


def main() -> None:
    """Build the engine that the first question names, then run what is asked (the process of an engine)."""
    asked = turns.questions()
    first = next(asked)
    prompts: list[str] = first["prompts"]
    started = time.perf_counter()
    engine = build(first["config"], Setup(**first["setup"]))
    seconds = time.perf_counter() - started
    engine.run(prompts[:2], 1)
    turns.answer(seconds)
    for question in asked:
        concurrency: int = question["concurrency"]
        adjust(engine, question["changed"])
        engine.run(prompts[: question["warm_up"]], concurrency)
        runs = [engine.run(prompts, concurrency, question["split"]) for _ in range(question["passes"])]
        turns.answer([asdict(run) for run in runs])


if __name__ == "__main__":
    main()
