"""How fast is recording, next to plain vLLM prefilling the same windows and answering the same prompts?

    python -m benchmarks.collect MODEL --data FILE.jsonl --prompts FILE.jsonl --out RESULT.json

Engines run one after the other in processes of their own, in turns over the repeats.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.results import write_result
from vllm_earlyexit.training.shards import RecordsConfig
from vllm_earlyexit.training.sources import CollectOptions

PREFILL = ("plain, compiled", "plain, eager", "collect")
ANSWERS = ("answers, plain", "answers, collect")
EXITS = (8, 10)
ANSWER_TOKENS = 256


def windows_of(model: str, data: Path, tokens: int) -> list[Any]:
    """Return windows of about ``tokens`` tokens."""
    from transformers import AutoTokenizer

    from vllm_earlyexit.training.data import cut, tokenize
    from vllm_earlyexit.training.records import read_records

    tokenizer, found, size = AutoTokenizer.from_pretrained(model), [], 0
    for record in read_records(data):
        for window in cut(tokenize(record, tokenizer), 512):
            found.append(window)
            size += len(window.ids)
        if size >= tokens:
            break
    return found


def plain_engine(model: str, eager: bool) -> Any:
    """Return vLLM as recording runs it, without recording."""
    from vllm import LLM
    from vllm.platforms import current_platform

    from vllm_earlyexit.training.sources import KV_CACHE, MODEL_LENGTH, NUM_SEQS
    from vllm_earlyexit.training.teacher import compute_dtype

    dtype: Any = compute_dtype(current_platform.device_type)
    return LLM(
        model,
        dtype=dtype,
        enforce_eager=eager,
        enable_prefix_caching=False,
        max_model_len=MODEL_LENGTH,
        max_num_batched_tokens=MODEL_LENGTH,
        max_num_seqs=NUM_SEQS,
        kv_cache_memory_bytes=KV_CACHE,
    )


def prefill(model: str, data: Path, tokens: int, config: str) -> tuple[int, float]:
    """Run windows of ``data`` through one configuration; return how many tokens and seconds."""
    from vllm import SamplingParams

    windows = windows_of(model, data, tokens)
    size = sum(len(window.ids) for window in windows)
    if config == "collect":
        from vllm_earlyexit.training.data import grouped
        from vllm_earlyexit.training.shards import write_shard

        with recording(model) as (folder, shape, options, source):
            source.observe(windows[:20])
            started = time.perf_counter()
            for number, group in enumerate(grouped(windows, options.shard_tokens)):
                write_shard(folder, number, shape, source.observe(group))
            return size, time.perf_counter() - started
    llm = plain_engine(model, config == "plain, eager")
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    inputs: list[Any] = [{"prompt_token_ids": window.ids} for window in windows]
    llm.generate(inputs[:20], params, use_tqdm=False)
    started = time.perf_counter()
    llm.generate(inputs, params, use_tqdm=False)
    return size, time.perf_counter() - started


def answers(model: str, prompts: Path, number: int, config: str) -> tuple[int, float]:
    """Have ``number`` prompts answered greedily; return how many tokens the model saw and said, and seconds."""
    from rich.console import Console
    from vllm import SamplingParams

    from vllm_earlyexit.training.collect import Collector
    from vllm_earlyexit.training.records import read_records

    if config == "answers, collect":
        with recording(model, number) as (folder, shape, options, source):
            list(source.answer([[1, 2, 3]] * 4, [False] * 4, options))
            collector = Collector(folder, shape, options, Console(quiet=True))
            started = time.perf_counter()
            collector.answer(source, [prompts])
            return collector.done.tokens, time.perf_counter() - started
    llm = plain_engine(model, eager=False)
    asked = [[{"role": "user", "content": r["turns"][0]}] for r in list(read_records(prompts))[:number]]
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    llm.chat(asked[:2], params, use_tqdm=False)
    started = time.perf_counter()
    done: list[Any] = llm.chat(asked, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    return sum(len(d.prompt_token_ids) + len(d.outputs[0].token_ids) - 1 for d in done), seconds


@contextmanager
def recording(model: str, number: int | None = None) -> Iterator[tuple[Path, RecordsConfig, CollectOptions, Any]]:
    """A fresh records folder with what it takes to fill it."""
    from vllm_earlyexit.training.collect import records_config
    from vllm_earlyexit.training.shards import open_records
    from vllm_earlyexit.training.sources import ServingSource

    options = CollectOptions(sampled=0, num_prompts=number, answer_tokens=ANSWER_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        shape = records_config(Path(model), "model", EXITS, options.top_k)
        open_records(Path(folder), shape)
        yield Path(folder), shape, options, ServingSource(Path(model), shape, options)


def main(
    model: str,
    data: Annotated[Path, typer.Option()],
    prompts: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()] = Path("result.json"),
    tokens: Annotated[int, typer.Option(help="Tokens to prefill.")] = 100_000,
    num_prompts: Annotated[int, typer.Option(help="Prompts to answer.")] = 256,
    repeats: Annotated[int, typer.Option()] = 3,
    config: Annotated[str, typer.Option(help="Run this one alone, in this process.")] = "",
) -> None:
    """Compare recording with plain prefill, and answering with recording on the way with plain answering."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if config:
        size, seconds = (
            answers(model, prompts, num_prompts, config) if config in ANSWERS else prefill(model, data, tokens, config)
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"tokens_per_s": round(size / seconds, 1), "peak_gb": round(peak / 1e9, 2), "tokens": size}))
        return
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in (*PREFILL, *ANSWERS)}
    for _ in range(repeats):
        for name, runs in seen.items():
            asked = ["--data", str(data), "--prompts", str(prompts)]
            asked += ["--tokens", str(tokens), "--num-prompts", str(num_prompts), "--config", name]
            command = [sys.executable, "-m", "benchmarks.collect", model, *asked]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    table = {
        name: {
            "tokens": runs[0]["tokens"],
            "tokens_per_s": statistics.median(run["tokens_per_s"] for run in runs),
            "runs": [run["tokens_per_s"] for run in runs],
            "peak_gb": max(run["peak_gb"] for run in runs),
        }
        for name, runs in seen.items()
    }
    speed = {name: row["tokens_per_s"] for name, row in table.items()}
    ratios = {
        "collect_over_plain_prefill": round(speed["collect"] / max(speed[name] for name in PREFILL[:2]), 3),
        "collect_over_plain_answers": round(speed["answers, collect"] / speed["answers, plain"], 3),
    }
    write_result(out, "collect", {"configs": table} | ratios)


if __name__ == "__main__":
    typer.run(main)
