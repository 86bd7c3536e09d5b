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

PREFILL = ("prefill, plain", "prefill, collect")
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


def plain_engine(model: str) -> Any:
    """Return vLLM as recording runs it, without recording."""
    from vllm import LLM
    from vllm.platforms import current_platform

    from vllm_earlyexit.training.sources import KV_CACHE, MODEL_LENGTH, NUM_SEQS
    from vllm_earlyexit.training.teacher import compute_dtype

    dtype: Any = compute_dtype(current_platform.device_type)
    return LLM(
        model,
        dtype=dtype,
        enable_prefix_caching=False,
        max_model_len=MODEL_LENGTH,
        max_num_batched_tokens=MODEL_LENGTH,
        max_num_seqs=NUM_SEQS,
        kv_cache_memory_bytes=KV_CACHE,
    )


def prefill(model: str, data: Path, tokens: int, recorded: bool, repeats: int) -> list[float]:
    """Run windows of ``data`` through the model, recorded or not; return tokens per second of each repeat."""
    windows, speeds = windows_of(model, data, tokens), []
    size = sum(len(window.ids) for window in windows)
    if recorded:
        from vllm_earlyexit.training.data import grouped
        from vllm_earlyexit.training.shards import write_shard

        with recording(model, repeats) as (folders, shape, options, source):
            source.observe(windows[:20])
            for folder in folders:
                started = time.perf_counter()
                for number, group in enumerate(grouped(windows, options.shard_tokens)):
                    write_shard(folder, number, shape, source.observe(group))
                speeds.append(size / (time.perf_counter() - started))
        return speeds
    from vllm import SamplingParams

    llm = plain_engine(model)
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    inputs: list[Any] = [{"prompt_token_ids": window.ids} for window in windows]
    llm.generate(inputs[:20], params, use_tqdm=False)
    for _ in range(repeats):
        started = time.perf_counter()
        llm.generate(inputs, params, use_tqdm=False)
        speeds.append(size / (time.perf_counter() - started))
    return speeds


def answers(model: str, prompts: Path, number: int, recorded: bool, repeats: int) -> list[float]:
    """Have ``number`` prompts answered greedily, recorded or not; return tokens per second, prompts included."""
    speeds = []
    if recorded:
        from rich.console import Console

        from vllm_earlyexit.training.collect import Collector

        with recording(model, repeats, number) as (folders, shape, options, source):
            list(source.answer([[1, 2, 3]] * 4, [False] * 4, options))
            for folder in folders:
                collector = Collector(folder, shape, options, Console(quiet=True))
                started = time.perf_counter()
                collector.answer(source, [prompts])
                speeds.append(collector.done.tokens / (time.perf_counter() - started))
        return speeds
    from vllm import SamplingParams

    from vllm_earlyexit.training.records import read_records

    llm = plain_engine(model)
    asked = [[{"role": "user", "content": r["turns"][0]}] for r in list(read_records(prompts))[:number]]
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    llm.chat(asked[:4], params, use_tqdm=False)
    for _ in range(repeats):
        started = time.perf_counter()
        done: list[Any] = llm.chat(asked, params, use_tqdm=False)
        size = sum(len(d.prompt_token_ids) + len(d.outputs[0].token_ids) - 1 for d in done)
        speeds.append(size / (time.perf_counter() - started))
    return speeds


@contextmanager
def recording(
    model: str, repeats: int, number: int | None = None
) -> Iterator[tuple[list[Path], RecordsConfig, CollectOptions, Any]]:
    """Fresh records folders, one for each repeat, with what it takes to fill them."""
    from vllm_earlyexit.training.collect import records_config
    from vllm_earlyexit.training.shards import open_records
    from vllm_earlyexit.training.sources import ServingSource

    options = CollectOptions(sampled=0, num_prompts=number, answer_tokens=ANSWER_TOKENS)
    with tempfile.TemporaryDirectory() as scratch:
        shape = records_config(Path(model), "model", EXITS, options.top_k)
        folders = [Path(scratch) / str(n) for n in range(repeats)]
        for folder in folders:
            open_records(folder, shape)
        yield folders, shape, options, ServingSource(Path(model), shape, options)


def main(
    model: str,
    data: Annotated[Path, typer.Option()],
    prompts: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()] = Path("result.json"),
    tokens: Annotated[int, typer.Option(help="Tokens to prefill.")] = 40_000,
    num_prompts: Annotated[int, typer.Option(help="Prompts to answer.")] = 128,
    repeats: Annotated[int, typer.Option(help="Runs of each configuration in one process.")] = 3,
    config: Annotated[str, typer.Option(help="Run this one alone, in this process.")] = "",
) -> None:
    """Compare recording with plain prefill, and answering with recording on the way with plain answering."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if config:
        recorded = config.endswith("collect")
        speeds = (
            answers(model, prompts, num_prompts, recorded, repeats)
            if config in ANSWERS
            else prefill(model, data, tokens, recorded, repeats)
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"tokens_per_s": [round(speed, 1) for speed in speeds], "peak_gb": round(peak / 1e9, 2)}))
        return
    table: dict[str, dict[str, Any]] = {}
    for name in (*PREFILL, *ANSWERS):
        asked = ["--data", str(data), "--prompts", str(prompts), "--repeats", str(repeats)]
        asked += ["--tokens", str(tokens), "--num-prompts", str(num_prompts), "--config", name]
        command = [sys.executable, "-m", "benchmarks.collect", model, *asked]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        table[name] = json.loads(done.stdout.splitlines()[-1])
    speed = {name: statistics.median(row["tokens_per_s"]) for name, row in table.items()}
    ratios = {
        "prefill_collect_over_plain": round(speed[PREFILL[1]] / speed[PREFILL[0]], 3),
        "answers_collect_over_plain": round(speed[ANSWERS[1]] / speed[ANSWERS[0]], 3),
    }
    shape = {"prefill_tokens": tokens, "prompts_answered": num_prompts, "longest_answer": ANSWER_TOKENS}
    write_result(out, "collect", shape | {"configs": table} | ratios)


if __name__ == "__main__":
    typer.run(main)
