"""``vllm serve`` with self-exit, asked by a real OpenAI client."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from benchmarks.servers import START_SECONDS, Server, serving

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
STREAMS = 8
FLAGS = (
    *("--served-model-name", "smollm2", "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "1024", "--max-num-seqs", "8"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)

SETTING = '{"policy": "entropy", "lowest_accuracy": 0.6}'
DRAFTING = ("--speculative-model", "[self-exit]", "--speculative-config", SETTING)
"""The policy auto, the default, need not draft on a machine where that does not pay."""


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(smollm2, tmp_path_factory.mktemp("serve") / "server.log", *FLAGS, *DRAFTING) as running:
        yield running


def ask(client: OpenAI, prompt: str, stream: bool, **sampling: Any) -> str:
    messages = [{"role": "user", "content": prompt}]
    arguments = {"model": "smollm2", "messages": messages, "temperature": 0, "max_tokens": 48, "stream": stream}
    arguments |= sampling
    answer = client.chat.completions.create(**arguments)  # type: ignore[call-overload]
    if not stream:
        return answer.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)


def call(client: OpenAI, place: str, **sampling: Any) -> tuple[str, str]:
    """Let the model call a tool about a place; return the tool's name and arguments."""
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": f"How warm is it in {place}?"}],
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        **sampling,
    )
    (called,) = answer.choices[0].message.tool_calls
    return called.function.name, called.function.arguments


def answers(server: Server, prompts: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Ask for texts, some of them sampled with a seed, and for tool calls, all at the same time."""
    client = OpenAI(base_url=server.url, api_key="none")
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1, "seed": 5}]
    with ThreadPoolExecutor(STREAMS) as pool:
        texts = [pool.submit(ask, client, p, stream=False, **kinds[n % 2]) for n, p in enumerate(prompts[:STREAMS])]
        calls = [pool.submit(call, client, place, **kind) for place in ("Rome", "Oslo") for kind in kinds]
        return [text.result() for text in texts], [one.result() for one in calls]


def test_a_server_answers_what_a_plain_one_answers(
    server: Server, smollm2: Path, tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
):
    """So do two replicas behind one address."""
    found = answers(server, prompts)
    with serving(smollm2, tmp_path / "plain.log", *FLAGS) as plain:
        assert found == answers(plain, prompts)
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    with serving(smollm2, tmp_path / "replicas.log", *FLAGS, *DRAFTING, "--data-parallel-size", "2") as replicas:
        assert found == answers(replicas, prompts)
        drafted = [replicas.metric("vllm:spec_decode_num_draft_tokens_total", f'engine="{n}"') for n in (0, 1)]
        assert min(drafted) > 0, "both draft"
    assert all(name == "weather" and arguments for name, arguments in found[1])


@pytest.mark.matrix("full")
def test_servers_are_driven_by_vllms_own_benchmark(smollm2: Path, tmp_path: Path):
    asked = tmp_path / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"id": n, "turns": [f"Count to {n}."]}) + "\n" for n in (3, 5)))
    command = [sys.executable, "-m", "benchmarks.serve", "ours=--speculative-model [self-exit]", "--out", tmp_path]
    command += ["--serve-arguments", "--dtype float32 --enforce-eager --max-model-len 1024"]
    command += ["--model", smollm2, "--prompts", asked, "--num-prompts", "2", "--alone-repeats", "1"]
    done = subprocess.run([*command, "--max-tokens", "16", "--repeats", "1"], check=False)
    (found,) = json.loads((tmp_path / "results.json").read_text())
    assert (found["server"], found["completed"], found["speedup"]) == ("ours", 2, 1)
    assert found["repeats"][0] > 0
    assert found["believable"] == (done.returncode == 0)
    assert 0 < found["acceptance_rate"] < 1


def test_concurrent_streams_are_answered_and_counted(server: Server, prompts: list[str]):
    client = OpenAI(base_url=server.url, api_key="none")
    asked = prompts[:STREAMS]
    with ThreadPoolExecutor(STREAMS) as pool:
        streamed = list(pool.map(lambda prompt: ask(client, prompt, stream=True), asked))
    with ThreadPoolExecutor(STREAMS) as pool:
        whole = list(pool.map(lambda prompt: ask(client, prompt, stream=False), asked))
    assert streamed == whole
    assert all(len(answer) > 10 for answer in streamed)
    drafted = server.metric("vllm:spec_decode_num_draft_tokens_total")
    accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total")
    assert drafted > accepted > 0
    assert server.metric("vllm:spec_decode_num_drafts_total") > 0
    early_exits_are_for_who_asks(server, client, asked, whole)
    # A client that vanishes mid-stream takes nobody with it.
    messages = [{"role": "user", "content": prompts[0]}]
    gone = client.chat.completions.create(model="smollm2", messages=messages, max_tokens=200, stream=True)  # type: ignore[call-overload]
    next(iter(gone))
    gone.close()
    assert ask(client, asked[1], stream=False) == whole[1]
    assert server.stop() == 0


def early_exits_are_for_who_asks(server: Server, client: OpenAI, asked: list[str], whole: list[str]) -> None:
    """Requests that exit early do so beside others, which get what they got without them."""
    kinds: list[dict[str, Any]] = [{}, {"extra_body": {"vllm_xargs": {"early_exit_accuracy": 0.6}}}]
    with ThreadPoolExecutor(STREAMS) as pool:
        mixed = list(pool.map(lambda n: ask(client, asked[n], stream=False, **kinds[n % 2]), range(len(asked))))
    assert mixed[::2] == whole[::2]
    messages = [{"role": "user", "content": asked[1]}]
    body: Any = {"model": "smollm2", "messages": messages, "temperature": 0, "max_tokens": 48} | kinds[1]
    said = client.chat.completions.create(**body).model_dump()["kv_transfer_params"]["self_exit"]
    assert sum(said["tokens_per_exit"].values()) == 48
    assert 2 < said["mean_exit_depth"] < 30
    assert mixed[1::2] != whole[1::2]
    early = server.metric("vllm:self_exit_early_tokens_total", 'exit_layer="2"')
    checked = server.metric("vllm:self_exit_checked_tokens_total")
    assert early >= checked > 10
    assert server.metric("vllm:self_exit_promised_tokens_total") == pytest.approx(0.6 * checked)
    assert server.metric("vllm:self_exit_involuntary_early_tokens_total") == 0
    assert server.metric("vllm:self_exit_agreed_tokens_total") > 5
    assert server.metric("vllm:self_exit_full_depth_tokens_total") > 10
    with pytest.raises(BadRequestError, match=r"must be at least 0\.6 here"):
        ask(client, asked[0], stream=False, extra_body={"vllm_xargs": {"early_exit_accuracy": 0.1}})
    assert ask(client, asked[0], stream=False) == whole[0]


def test_bad_heads_end_the_server_with_one_sentence(smollm2: Path, tmp_path: Path):
    failing = Server(smollm2, tmp_path / "server.log", *FLAGS, "--speculative-model", "[self-exit]:no/such/heads")
    assert failing.process.wait(timeout=START_SECONDS) != 0
    failing.stop()
    log = failing.log.read_text()
    assert "self-exit: there is no heads folder 'no/such/heads'" in log
    assert "Loading weights" not in log
    assert "Starting to load model" not in log
