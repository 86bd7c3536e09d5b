"""What goes wrong around a server stays where it went wrong, or ends the server as vLLM ends it."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI, OpenAIError

from benchmarks.servers import serving
from tests.e2e.test_serve import FLAGS, ask
from vllm_earlyexit.assets import shipped_heads
from vllm_earlyexit.heads.checkpoint import load_heads
from vllm_earlyexit.heads.fingerprint import fingerprint


def processes(pid: int) -> dict[int, str]:
    """Return all processes below one, and their names."""
    found = {}
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        found |= {child: Path(f"/proc/{child}/cmdline").read_text()} | processes(child)
    return found


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
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in below):
        assert time.monotonic() < deadline, "something is left of it"
        time.sleep(0.5)
