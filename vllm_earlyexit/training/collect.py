"""Let a model answer prompts through vLLM, so that its heads can be trained on its own words."""

import json
from pathlib import Path
from typing import Any

from rich.progress import track

from vllm_earlyexit.training.records import read_records


def collect_answers(
    model: str,
    prompts: Path,
    out: Path,
    *,
    num_prompts: int | None = None,
    max_tokens: int = 256,
    temperature: float = 0.7,
    max_num_seqs: int = 128,
    seed: int = 0,
) -> int:
    """Append one JSON line ``{"id", "turns": [prompt, answer]}`` per prompt to ``out``; return how many were written.

    Even-numbered prompts are answered greedily and odd-numbered ones at ``temperature``: greedy answers are what is
    drafted most, sampled ones keep repetitive loops of small models from dominating. Prompts whose id is in ``out``
    already are not asked again, so a stopped run continues.
    """
    from vllm import LLM, SamplingParams

    done = {record["id"] for record in read_records(out)} if out.exists() else set()
    asked = [record for record in read_records(prompts) if "turns" in record][:num_prompts]
    todo = [record for record in asked if record["id"] not in done]
    if not todo:
        return 0
    llm = LLM(model=model, max_num_seqs=max_num_seqs, seed=seed, enforce_eager=True)
    greedy = SamplingParams(temperature=0, max_tokens=max_tokens)
    sampled = SamplingParams(temperature=temperature, top_p=0.95, max_tokens=max_tokens)
    out.parent.mkdir(parents=True, exist_ok=True)
    size = 2 * max_num_seqs
    with out.open("a", encoding="utf-8") as sink:
        for start in track(range(0, len(todo), size), description="answering"):
            chunk = todo[start : start + size]
            messages: list[Any] = [[{"role": "user", "content": record["turns"][0]}] for record in chunk]
            params = [greedy if n % 2 == 0 else sampled for n in range(len(chunk))]
            for record, answer in zip(chunk, llm.chat(messages, params, use_tqdm=False), strict=True):
                line = {"id": record["id"], "turns": [record["turns"][0], answer.outputs[0].text]}
                sink.write(json.dumps(line) + "\n")
            sink.flush()
    return len(todo)
