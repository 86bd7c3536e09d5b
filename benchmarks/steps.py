"""What drafting and resuming cost beside the layers and heads that they run.

    python -m benchmarks.steps MODEL --prompts FILE.jsonl --out RESULT.json

Drafts a fixed length and times every round: how long a draft step takes beyond its layers and its head, and how long a
resumed verification takes beside the layers that it runs. Both are ideal if they take no longer.
"""

import os
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.engines import runner_of, timed
from benchmarks.results import write_result
from vllm_earlyexit.training.records import read_records


def quartiles(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)], "rounds": len(values)}


def main(
    model: str,
    prompts: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    heads: Annotated[str | None, typer.Option(help="By default the shipped ones.")] = None,
    num_prompts: Annotated[int, typer.Option()] = 4,
    max_tokens: Annotated[int, typer.Option()] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a draft.")] = 3,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
) -> None:
    """Answer prompts one at a time and write what rounds took."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    setting: dict[str, Any] = {"method": "self_exit", "policy": "fixed", "num_speculative_tokens": length}
    llm = LLM(
        model,
        dtype=dtype,  # type: ignore[arg-type]
        max_model_len=1024,
        max_num_seqs=8,
        enable_prefix_caching=False,
        speculative_config=setting | ({"model": heads} if heads else {}),
    )
    runner = runner_of(llm)
    proposer = runner.drafter
    (drafted_from,) = proposer.drafter.exits
    seconds: dict[str, float] = {}
    steps = 0

    def watch(owner: Any, attribute: str, name: str) -> None:
        setattr(owner, attribute, timed(getattr(owner, attribute), seconds, name))

    def count_step(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        return head(*arguments)

    for segment in drafted_from.below:
        watch(segment._model, "forward", "below")
    for segment in drafted_from.above:
        watch(segment._model, "forward", "above")
    watch(drafted_from, "head", "head")
    watch(proposer, "forward", "resume")
    watch(proposer, "propose", "propose")
    head, drafted_from.head = drafted_from.head, count_step
    asked = [[{"role": "user", "content": item["turns"][0]}] for item in read_records(prompts)][:num_prompts]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    llm.chat(asked[:1], params, use_tqdm=False)
    drafts, resumes = [], []
    inner, forward = proposer.propose, proposer.forward

    def propose(*arguments: Any) -> Any:
        nonlocal steps
        seconds.clear()
        steps = 0
        found = inner(*arguments)
        if steps:
            beside = seconds["propose"] - seconds["below"] - seconds["head"]
            spent = {"beside": beside, "below": seconds["below"], "head": seconds["head"]}
            drafts.append({part: 1000 * value / steps for part, value in spent.items()})
        return found

    def resumed(*arguments: Any) -> Any:
        seconds.clear()
        found = forward(*arguments)
        if found is not None:
            resumes.append(seconds["resume"] / (seconds["above"] + seconds.get("below", 0.0)))
        return found

    proposer.propose, proposer.forward = propose, resumed
    for prompt in asked:
        llm.chat([prompt], params, use_tqdm=False)
    measured = {
        "draft_length": length,
        "dtype": dtype,
        "draft_step_ms_beside_layers_and_head": quartiles([draft["beside"] for draft in drafts]),
        "layers_below_ms": quartiles([draft["below"] for draft in drafts]),
        "head_ms": quartiles([draft["head"] for draft in drafts]),
        "resumed_verification_over_its_layers": quartiles(resumes),
    }
    write_result(out, "steps", measured)


if __name__ == "__main__":
    typer.run(main)
