"""How fast is recording, next to plain vLLM prefilling the same windows?

    python -m benchmarks.collect MODEL --data FILE.jsonl --out RESULT.json

Engines run one after the other in processes of their own, in turns over the repeats.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.results import write_result

CONFIGS = ("plain, compiled", "plain, eager", "collect")


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


def one(model: str, data: Path, tokens: int, config: str) -> None:
    """Run one configuration, after a warm-up, and print its figures as JSON."""
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    from vllm_earlyexit.training.teacher import compute_dtype

    windows = windows_of(model, data, tokens)
    warm, size = windows[:20], sum(len(window.ids) for window in windows)
    if config == "collect":
        from vllm_earlyexit.training.collect import records_config
        from vllm_earlyexit.training.data import grouped
        from vllm_earlyexit.training.shards import open_records, write_shard
        from vllm_earlyexit.training.sources import CollectOptions, ServingSource

        options = CollectOptions()
        with tempfile.TemporaryDirectory() as folder:
            shape = records_config(Path(model), "model", [8, 10], options.top_k)
            open_records(Path(folder), shape)
            source = ServingSource(Path(model), shape, options)
            source.observe(warm)
            started = time.perf_counter()
            for number, group in enumerate(grouped(windows, options.shard_tokens)):
                write_shard(Path(folder), number, shape, source.observe(group))
            seconds = time.perf_counter() - started
    else:
        llm = LLM(
            model,
            dtype=compute_dtype(current_platform.device_type),
            enforce_eager=config == "plain, eager",
            enable_prefix_caching=False,
            max_model_len=4096,
            max_num_batched_tokens=4096,
            kv_cache_memory_bytes=2 << 30,
        )
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        prompts: list[Any] = [{"prompt_token_ids": window.ids} for window in windows]
        llm.generate(prompts[: len(warm)], params, use_tqdm=False)
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens_per_s": round(size / seconds, 1), "peak_gb": round(peak / 1e9, 2), "tokens": size}))


def main(
    model: str,
    data: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()] = Path("result.json"),
    tokens: Annotated[int, typer.Option()] = 100_000,
    repeats: Annotated[int, typer.Option()] = 3,
    config: Annotated[str, typer.Option(help="Run this one alone, in this process.")] = "",
) -> None:
    """Compare recording with plain prefill."""
    if config:
        one(model, data, tokens, config)
        return
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in CONFIGS}
    for _ in range(repeats):
        for name in CONFIGS:
            command = [sys.executable, "-m", "benchmarks.collect", model, "--data", str(data), "--tokens", str(tokens)]
            done = subprocess.run([*command, "--config", name], check=True, capture_output=True, text=True)
            seen[name].append(json.loads(done.stdout.splitlines()[-1]))
    table = {
        name: {
            "tokens_per_s": statistics.median(run["tokens_per_s"] for run in runs),
            "runs": [run["tokens_per_s"] for run in runs],
            "peak_gb": max(run["peak_gb"] for run in runs),
        }
        for name, runs in seen.items()
    }
    plain = max(table[name]["tokens_per_s"] for name in CONFIGS[:2])
    ratio = round(table["collect"]["tokens_per_s"] / plain, 3)
    write_result(
        out, "collect", {"tokens": seen["collect"][0]["tokens"], "configs": table, "collect_over_plain": ratio}
    )


if __name__ == "__main__":
    typer.run(main)
