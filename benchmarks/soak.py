"""Hours of mixed traffic against one server: are answers right, does memory stay flat, is every block given back?

    python -m benchmarks.soak MODEL --prompts FILE.jsonl --minutes 60 --clients 64 --out FILE

A plain ``vllm serve`` answers every prompt greedily first. Then clients ask a self-exit server at random for greedy
answers of random lengths, which are compared token by token, for sampled ones, several choices, log-probabilities and
structured outputs, and hang up in the middle of others. Where a greedy answer parts from plain vLLM's, transformers
says whether that is where the full model's two best logits are within 1e-3.

oneDNN, PyTorch's library of CPU kernels, keeps a kernel for each of the newest 1,024 shapes that it has met, and mixed
traffic has many shapes: a plain server, too, grows for an hour. Here it keeps 32, so that a leak would show.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import DefaultHttpxClient, OpenAI
from rich.console import Console
from rich.progress import Progress

from benchmarks.near_ties import NearTies
from benchmarks.servers import Server, serving
from vllm_earlyexit.provenance import provenance
from vllm_earlyexit.training.records import read_records

NAME, PLAIN, LONGEST = "soak", "plain", 96
KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
WARM_UP = 0.25
"""Share of the time after which memory is compared with its end."""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FLAGS = ("--served-model-name", NAME, "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024")
Plain = dict[str, list[int]]


@dataclass
class Traffic:
    """What clients have seen.

    Attributes:
        asked: Requests by kind.
        parted: Prompts and tokens of greedy answers that were not plain vLLM's.
        failed: What went wrong otherwise, in words.
    """

    asked: Counter[str] = field(default_factory=Counter)
    parted: list[tuple[str, list[int]]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def ask(client: OpenAI, prompt: str, **wishes: Any) -> Any:
    """Ask one question; return the API's answer."""
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model=NAME, messages=messages, **wishes)  # type: ignore[call-overload]


def greedy(client: OpenAI, prompt: str, length: int) -> list[int]:
    """Return the tokens of a greedy answer."""
    answer = ask(client, prompt, temperature=0, max_tokens=length, extra_body={"return_token_ids": True})
    return list(answer.choices[0].token_ids)


def one_request(client: OpenAI, plain: Plain, dice: random.Random, seen: Traffic) -> None:
    """Ask something at random and check what can be checked."""
    kinds = ("greedy", "sampled", "choices", "logprobs", "structured", "hung up")
    kind = dice.choices(kinds, weights=(8, 3, 1, 1, 2, 3))[0]
    prompt, length = dice.choice(list(plain)), dice.randint(1, LONGEST)
    hot = {"temperature": dice.uniform(0.2, 1.5), "top_p": dice.uniform(0.5, 1.0), "max_tokens": length}
    try:
        if kind == "greedy":
            tokens = greedy(client, prompt, length)
            if tokens != plain[prompt][: len(tokens)] or len(tokens) < min(length, len(plain[prompt])):
                seen.parted.append((prompt, tokens))
        elif kind == "choices":
            assert len(ask(client, prompt, n=2, **hot).choices) == 2
        elif kind == "logprobs":
            logprobs = ask(client, prompt, logprobs=True, top_logprobs=2, **hot).choices[0].logprobs
            assert all(token.logprob <= 0 for token in logprobs.content)
        elif kind == "structured":
            wish = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
            answer = ask(client, prompt, temperature=hot["temperature"], max_tokens=128, response_format=wish)
            if answer.choices[0].finish_reason == "stop":
                assert set(json.loads(answer.choices[0].message.content)) == {"name", "age"}
        elif kind == "hung up":
            stream = ask(client, prompt, stream=True, **hot)
            for _, _ in zip(range(dice.randint(0, 8)), stream, strict=False):
                pass
            stream.close()
        else:
            ask(client, prompt, **hot)
        seen.asked[kind] += 1
    except Exception as error:  # whatever it is, it is a finding
        seen.failed.append(f"{kind}: {type(error).__name__}: {error}")


def memory(pid: int) -> Counter[str]:
    """Return the resident bytes of a process and all its children, by their names; on Linux."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    found = Counter({Path(f"/proc/{pid}/comm").read_text().strip(): pages * resource.getpagesize()})
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += memory(int(child))
    return found


def client_of(server: Server) -> OpenAI:
    """Return a client of a server that tries everything once.

    Every request has a connection of its own: the server closes idle ones, perhaps while a request is on its way.
    """
    alone = DefaultHttpxClient(limits=httpx.Limits(max_keepalive_connections=0))
    return OpenAI(base_url=server.url, api_key="none", timeout=600, max_retries=0, http_client=alone)


def traffic(server: Server, plain: Plain, minutes: float, clients: int, seed: int) -> dict[str, Any]:
    """Let clients ask until the time is up; return what was seen."""
    seen, until = Traffic(), time.monotonic() + 60 * minutes
    samples: list[Counter[str]] = []

    def customer(number: int) -> None:
        client = client_of(server)
        dice = random.Random(f"{seed} {number}")
        while time.monotonic() < until:
            one_request(client, plain, dice, seen)

    threads = [threading.Thread(target=customer, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    with Progress() as progress:
        bar = progress.add_task("asking", total=60 * minutes)
        while any(thread.is_alive() for thread in threads):
            samples.append(memory(server.process.pid))
            progress.update(bar, completed=60 * minutes - max(0.0, until - time.monotonic()))
            time.sleep(2)
    for _ in range(30):  # hung-up requests are aborted a little later
        left = server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")
        if not left:
            break
        time.sleep(1)
    warm = samples[int(WARM_UP * len(samples))]
    return {
        "requests": dict(seen.asked),
        "failed": seen.failed[:20],
        "parted": seen.parted,
        "preemptions": server.metric("vllm:num_preemptions_total"),
        "drafted": server.metric("vllm:spec_decode_num_draft_tokens_total"),
        "accepted": server.metric("vllm:spec_decode_num_accepted_tokens_total"),
        "requests_left": left,
        "kv_cache_usage_at_end": server.metric("vllm:kv_cache_usage_perc"),
        "memory_after_warm_up": warm.total(),
        "memory_at_end": samples[-1].total(),
        "megabytes_over_time": [
            {name: round(size / 1e6) for name, size in one.items()} for one in samples[:: max(1, len(samples) // 20)]
        ],
    }


def soak(model: Path, prompts: list[str], minutes: float, clients: int, policy: str, seed: int = 0) -> dict[str, Any]:
    """Answer ``prompts`` with a plain server, then let clients soak a self-exit server; return what was seen."""
    os.environ.setdefault(KERNELS, "32")
    with tempfile.TemporaryDirectory() as folder:
        with serving(model, Path(folder) / "plain.log", *FLAGS) as server, ThreadPoolExecutor(8) as pool:
            client = client_of(server)
            answers = pool.map(lambda prompt: greedy(client, prompt, LONGEST), prompts)
            plain = dict(zip(prompts, answers, strict=True))
        ours = ("--speculative-model", "[self-exit]", "--speculative-config", json.dumps({"policy": policy}))
        drafting = () if policy == PLAIN else ours
        tight = ("--num-gpu-blocks-override", "64", "--block-size", "32", "--max-num-batched-tokens", "256")
        with serving(model, Path(folder) / "server.log", *FLAGS, *tight, *drafting) as server:
            found = traffic(server, plain, minutes, clients, seed)
            again = {prompt: greedy(client_of(server), prompt, LONGEST) for prompt in prompts[:4]}
            found["parted"] += [(p, tokens) for p, tokens in again.items() if tokens != plain[p]]
            found["exit_code"] = server.stop()
    parted, judge = found.pop("parted"), NearTies(model)
    return found | {
        "minutes": minutes,
        "clients": clients,
        "policy": policy,
        KERNELS.lower(): int(os.environ[KERNELS]),
        "greedy_parted": len(parted),
        "greedy_parted_at_near_ties": sum(judge.excuses(prompt, tokens, plain[prompt]) for prompt, tokens in parted),
    }


def main() -> None:
    """Soak, and write what was seen."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("model", type=Path, help="Folder.")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with turns; the first turn is asked.")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument(
        "--policy", default="entropy", help="auto hardly drafts under such load; 'plain': no self-exit, to compare."
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    prompts = [item["turns"][0] for item in read_records(options.prompts)]
    found = soak(options.model.resolve(), prompts, options.minutes, options.clients, options.policy)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found | {"provenance": provenance("python -m benchmarks.soak")}, indent=1) + "\n")
    Console().print_json(data=found)


if __name__ == "__main__":
    main()
