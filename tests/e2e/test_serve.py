"""``vllm serve`` with self-exit, asked by a real OpenAI client."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI

START_SECONDS = 240
STREAMS = 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def vllm_command() -> str:
    beside = Path(sys.executable).parent / "vllm"
    return str(beside) if beside.exists() else shutil.which("vllm") or "vllm"


class Server:
    """A running ``vllm serve``."""

    def __init__(self, model: Path, log: Path, *arguments: str):
        self.port, self.log = free_port(), log
        command = [vllm_command(), "serve", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--served-model-name", "smollm2", "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", "1024", "--max-num-seqs", "8", *arguments]
        env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)

    def wait(self) -> None:
        """Wait until the server answers; fail with its log if it ends first."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"vllm serve ended:\n{self.log.read_text()[-4000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        pytest.fail(f"vllm serve did not start:\n{self.log.read_text()[-4000:]}")

    def metric(self, name: str) -> float:
        """Return the sum of a counter over its labels, from /metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{re.escape(name)}[{{ ]", line))

    def stop(self) -> int:
        """Ask the server to end as an operator would; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "server.log"
    # The policy auto, the default, need not draft on a machine where that does not pay.
    drafting = ("--speculative-model", "[self-exit]", "--speculative-config", '{"policy": "entropy"}')
    running = Server(smollm2, log, *drafting)
    try:
        running.wait()
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def ask(client: OpenAI, prompt: str, stream: bool) -> str:
    messages = [{"role": "user", "content": prompt}]
    arguments = {"model": "smollm2", "messages": messages, "temperature": 0, "max_tokens": 48, "stream": stream}
    answer = client.chat.completions.create(**arguments)  # type: ignore[call-overload]
    if not stream:
        return answer.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)


def test_concurrent_streams_are_answered_and_counted(server: Server, prompts: list[str]):
    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
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
    # A client that vanishes mid-stream takes nobody with it.
    messages = [{"role": "user", "content": prompts[0]}]
    gone = client.chat.completions.create(model="smollm2", messages=messages, max_tokens=200, stream=True)  # type: ignore[call-overload]
    next(iter(gone))
    gone.close()
    assert ask(client, asked[1], stream=False) == whole[1]
    assert server.stop() == 0


def test_bad_heads_end_the_server_with_one_sentence(smollm2: Path, tmp_path: Path):
    failing = Server(smollm2, tmp_path / "server.log", "--speculative-model", "[self-exit]:no/such/heads")
    assert failing.process.wait(timeout=START_SECONDS) != 0
    log = failing.log.read_text()
    assert "self-exit: there is no heads folder 'no/such/heads'" in log
    assert "Loading weights" not in log
    assert "Starting to load model" not in log
