"""What goes wrong around a server stays where it went wrong, or ends the server as vLLM ends it."""

import os
import re
import signal
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from openai import OpenAI, OpenAIError

from benchmarks.servers import START_SECONDS, Server, serving
from tests.e2e.test_serve import DRAFTING, FLAGS, ask
from vllm_earlyexit.assets import shipped_heads
from vllm_earlyexit.heads.checkpoint import load_heads
from vllm_earlyexit.heads.fingerprint import fingerprint


def processes(pid: int) -> dict[int, str]:
    """Return all processes below one, and their names."""
    found: dict[int, str] = {}
    with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            found |= processes(child) | {child: Path(f"/proc/{child}/cmdline").read_text()}
    return found


def assert_gone(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "something is left of it"
        time.sleep(0.5)


@pytest.mark.matrix("full")
def test_heads_that_change_and_a_worker_that_dies(smollm2: Path, prompts: list[str], tmp_path: Path):
    shipped = shipped_heads(fingerprint(smollm2))
    assert shipped is not None
    heads = tmp_path / "heads"
    load_heads(shipped).save(heads, storage="float32")  # what is served has the file's own layout
    drafting = ("--speculative-model", f"[self-exit]:{heads}", "--speculative-config", '{"policy": "entropy"}')
    with serving(smollm2, tmp_path / "server.log", *FLAGS, *drafting) as server:
        client = OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)
        before = ask(client, prompts[0], stream=False)
        drafted = server.metric("vllm:spec_decode_num_draft_tokens_total")

        for file in heads.iterdir():  # in place, so that a file mapped into memory would change too
            with file.open("r+b") as opened:
                opened.write(os.urandom(file.stat().st_size))
        assert ask(client, prompts[0], stream=False) == before
        assert "vllm:self_exit_silent_tokens_total 0.0" in server.metrics()
        assert server.metric("vllm:spec_decode_num_draft_tokens_total") == 2 * drafted > 0

        with ThreadPoolExecutor(4) as pool:
            endless = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
            lost = [pool.submit(ask, client, prompt, stream=False, **endless) for prompt in prompts[:4]]
            while server.metric("vllm:spec_decode_num_draft_tokens_total") < 2 * drafted + 40:
                time.sleep(0.2)
            below = processes(server.process.pid)
            (worker,) = (pid for pid, name in below.items() if "Worker" in name)
            os.kill(worker, signal.SIGKILL)
            assert all(isinstance(one.exception(timeout=120), OpenAIError) for one in lost), "clients are told"
        server.process.wait(timeout=120)  # vLLM ends the server; whoever watches it starts it again
        assert_gone(below)


@pytest.mark.matrix("full")
def test_too_little_memory_ends_the_server_as_it_ends_a_plain_one(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4000")  # GiB
    ends = []
    for name, drafting in (("plain", ()), ("ours", DRAFTING)):
        server, below = Server(smollm2, tmp_path / f"{name}.log", *FLAGS, *drafting), {}
        deadline = time.monotonic() + START_SECONDS
        while server.process.poll() is None:
            assert time.monotonic() < deadline, "it hangs"
            below |= processes(server.process.pid)
            time.sleep(0.5)
        assert_gone(below)
        server.stop()
        said = re.search(r"requested memory for kv \(4000.0 GiB\)[^'\n]*", server.log.read_text())
        ends.append((server.process.returncode, said and said[0]))
    assert ends[0] == ends[1]
    assert all(code != 0 and reason for code, reason in ends)
