"""What early exits cost in quality and what they save, on tasks that can be checked.

    python -m benchmarks.quality --model MODEL --heads HEADS --humaneval FILE.jsonl --reasoning basic_arithmetic
        --prompts FILE.jsonl --configs ar self-exit early:resume:0.9 depth:22 --concurrency 8 --out FOLDER

Each configuration answers greedily, in a process of its own; those that differ in accuracy alone share one. Plain vLLM
then says how likely the full model finds the answers to ``--prompts``. With ``--warm-up`` each has answered other
prompts before, so that those that exit early have checked their first tokens. Answers to HumanEval are run in
subprocesses with limits on time, memory and files; that protects against accidents, not against malice.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.engines import Run, Setup, VLLMEngine, adjust, family, speculative_config
from benchmarks.pictures import quality_against_speed
from benchmarks.throughput import early_exits, setup_of, spread
from vllm_earlyexit.provenance import provenance
from vllm_earlyexit.training.records import read_records

SECONDS, BYTES = 10, 2 << 30
LIMITS = f"""
import resource
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({BYTES}, {BYTES}))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
"""
EASY = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
}
"""Settings at which models of half a billion parameters are well above chance."""
CODE = re.compile(r"```(?:python)?\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Task:
    """Prompts and how their answers are judged.

    Attributes:
        name: Of the task.
        prompts: What is asked.
        keys: What judging an answer needs, prompt by prompt.
    """

    name: str
    prompts: list[str]
    keys: list[dict[str, Any]]

    def scores(self, answers: list[str]) -> list[float]:
        """Return 0 to 1 for each answer; nothing if the task is not judged so."""
        if self.name == "humaneval":
            return [float(passes(answer, key)) for answer, key in zip(answers, self.keys, strict=True)]
        if self.name == "prompts":
            return []
        import reasoning_gym

        judge = reasoning_gym.get_score_answer_fn(self.name)

        def right(answer: str, key: dict[str, Any]) -> float:
            try:
                return float(judge(answer=final_answer(answer), entry=key) == 1)
            except (ValueError, ArithmeticError, LookupError):  # some judges stumble over what is no answer
                return 0.0

        return [right(answer, key) for answer, key in zip(answers, self.keys, strict=True)]


def humaneval(path: Path, number: int) -> Task:
    """Return HumanEval from JSON lines with turns, test and entry_point."""
    items = [json.loads(line) for line in path.read_text().splitlines()]
    items = spread(items, number)
    return Task("humaneval", [item["turns"][0] for item in items], items)


def reasoning(name: str, number: int) -> Task:
    """Return a task family of reasoning-gym."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, size=number, seed=0, **EASY.get(name, {}))
    items = [dataset[n] for n in range(number)]
    ask = "{}\nExplain every step. End with a line that has nothing but 'Answer: ' and the number."
    return Task(name, [ask.format(item["question"]) for item in items], items)


def final_answer(answer: str) -> str:
    """Return what an answer gives as its result."""
    return answer.rpartition("Answer:")[2].strip().strip("*$`. ")


def passes(answer: str, item: dict[str, Any]) -> bool:
    """Return whether the code in an answer passes HumanEval's test."""
    found = CODE.search(answer)
    code = found.group(1) if found else answer
    prompt = CODE.search(item["turns"][0])
    assert prompt is not None
    imports = "\n".join(line for line in prompt.group(1).splitlines() if line.startswith(("import ", "from ")))
    program = "\n".join([LIMITS, imports, code, item["test"], f"check({item['entry_point']})"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


@contextmanager
def own_process() -> Iterator[ProcessPoolExecutor]:
    """A fresh process, gone afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def answered(
    configs: list[str], setup: Setup, tasks: list[Task], concurrency: int, warm_up: list[str]
) -> list[list[tuple[Run, list[str]]]]:
    """Return for each configuration of one family what its engine answered to each task.

    Args:
        configs: The family.
        setup: What they share.
        tasks: The tasks.
        concurrency: Requests at a time.
        warm_up: Prompts that every configuration answers before them, as a server would have.
    """
    engine = VLLMEngine(configs[0], setup)
    engine.run(tasks[0].prompts[:2], concurrency)
    found = []
    for config in configs:
        adjust(engine, family(config)[1])
        if warm_up:
            engine.run(warm_up, concurrency)
        found.append([])
        for task in tasks:
            run = engine.run(task.prompts, concurrency)
            found[-1].append((run, [engine.text(tokens) for tokens in run.outputs]))
    return found


def judged(setup: Setup, prompts: list[str], outputs: list[list[list[int]]]) -> list[tuple[float, float]]:
    """Return how the full model judges several configurations' answers to the same prompts.

    Args:
        setup: The model.
        prompts: What was asked.
        outputs: By configuration, answer by answer.

    Returns:
        Of each configuration the mean log-probability of a token, in nats, averaged over answers, and the share of
        tokens that are the full model's most probable ones.
    """
    engine = VLLMEngine("ar", replace(setup, compiled=False))
    return [engine.likelihood(prompts, answers) for answers in outputs]


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument("--model", required=True, help="Folder or Hub id.")
    parser.add_argument("--heads", help="Folder of exit heads; by default the shipped ones.")
    parser.add_argument("--humaneval", type=Path, help="JSON lines with turns, test and entry_point.")
    parser.add_argument("--reasoning", nargs="*", default=[], help="Task families of reasoning-gym.")
    parser.add_argument("--prompts", type=Path, help="JSON lines with turns, to be judged by the full model.")
    parser.add_argument("--num-prompts", type=int, default=200, help="Of each task.")
    parser.add_argument("--warm-up", type=Path, help="JSON lines with turns, answered before the tasks.")
    parser.add_argument("--num-warm-up", type=int, default=8, help="How many of these.")
    parser.add_argument("--max-tokens", type=int, default=320)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--configs", nargs="+", default=["ar", "self-exit", "early:resume:0.9"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--out", type=Path, required=True, help="Folder of quality.json and the picture.")
    return parser.parse_args()


def families(configs: list[str]) -> list[list[str]]:
    """Return the configurations, those that share an engine together."""
    found: dict[str, list[str]] = {}
    for config in configs:
        found.setdefault(family(config)[0], []).append(config)
    return [*found.values()]


def main() -> None:
    """Let every configuration answer every task; judge; write quality.json after each."""
    options = parsed()
    setup = setup_of(options, options.concurrency)
    for config in options.configs:
        speculative_config(config, setup)
    tasks = [reasoning(name, options.num_prompts) for name in options.reasoning]
    if options.humaneval:
        tasks.append(humaneval(options.humaneval, options.num_prompts))
    if options.prompts:
        asked = spread([item["turns"][0] for item in read_records(options.prompts)], options.num_prompts)
        tasks.append(Task("prompts", asked, [{} for _ in asked]))
    warm_up = []
    if options.warm_up:
        warm_up = spread([item["turns"][0] for item in read_records(options.warm_up)], options.num_warm_up)
    records: list[dict[str, Any]] = []
    outputs: dict[str, list[list[list[int]]]] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    for configs in families(options.configs):
        with own_process() as pool:
            done = pool.submit(answered, configs, setup, tasks, options.concurrency, warm_up).result()
        for config, results in zip(configs, done, strict=True):
            for task, (run, answers) in zip(tasks, results, strict=True):
                outputs.setdefault(task.name, []).append(run.outputs)
                records.append(record(setup, config, task, options.concurrency, run, task.scores(answers)))
        write(options.out, records)
    if options.prompts:
        with own_process() as pool:
            likelihoods = pool.submit(judged, setup, tasks[-1].prompts, outputs["prompts"]).result()
        texts = [item for item in records if item["task"] == "prompts"]
        for item, (likelihood, agreement) in zip(texts, likelihoods, strict=True):
            item |= {"log_likelihood_per_token": round(likelihood, 4), "full_model_choice": round(agreement, 4)}
        write(options.out, records)
    quality_against_speed(records, options.out / "quality.png")


def record(setup: Setup, config: str, task: Task, concurrency: int, run: Run, scores: list[float]) -> dict[str, Any]:
    """Return one record of quality.json."""
    mean = sum(scores) / len(scores) if scores else None
    return {
        "config": config,
        "model": Path(setup.model).name,
        "dtype": setup.dtype,
        "compiled": setup.compiled,
        "concurrency": concurrency,
        "task": task.name,
        "num_prompts": len(task.prompts),
        "score": None if mean is None else round(mean, 4),
        "standard_error": None if mean is None else round(math.sqrt(mean * (1 - mean) / len(scores)), 4),
        "tokens": run.tokens,
        "tokens_per_s": round(run.tokens / run.seconds, 2),
        "early_exits": early_exits(run, setup),
        "early_counts": run.early,
    }


def write(out: Path, records: list[dict[str, Any]]) -> None:
    """Write quality.json and print what is new in it."""
    source = provenance("python -m benchmarks.quality")
    (out / "quality.json").write_text(json.dumps([item | {"provenance": source} for item in records], indent=1) + "\n")
    for item in records:
        print({key: item[key] for key in ("config", "task", "score", "tokens_per_s", "early_exits")}, flush=True)


if __name__ == "__main__":
    main()
