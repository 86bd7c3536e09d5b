"""A ``vllm serve`` of one's own, on loopback."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_earlyexit.turns import Group

START_SECONDS = 600


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def vllm_command() -> str:
    """Return the command ``vllm`` of this Python's environment."""
    beside = Path(sys.executable).parent / "vllm"
    return str(beside) if beside.exists() else shutil.which("vllm") or "vllm"


class Server(Group):
    """A running ``vllm serve``, with all of its processes.

    Args:
        model: Folder.
        log: Where its output goes.
        arguments: What else it is told.
    """

    def __init__(self, model: Path, log: Path, *arguments: str):
        self.port, self.log = free_port(), log
        command = [vllm_command(), "serve", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        env = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        with log.open("w") as out:
            super().__init__([*command, *arguments], stdout=out, stderr=subprocess.STDOUT, env=env)

    @property
    def url(self) -> str:
        """Where its OpenAI-compatible API is."""
        return f"http://127.0.0.1:{self.port}/v1"

    def wait(self, seconds: float = START_SECONDS) -> None:
        """Wait until it answers, at most so long.

        Raises:
            RuntimeError: it has ended, or does not answer in time; the message ends with its log.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm serve ended:\n{self.log.read_text()[-4000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise RuntimeError(f"vllm serve did not start:\n{self.log.read_text()[-4000:]}")

    def metrics(self) -> str:
        """Return the text of its /metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as page:
            return page.read().decode()

    def metric(self, name: str, label: str = "") -> float:
        """Return the sum of a metric over its labels, or over those with ``label``, from /metrics."""
        lines = [line for line in self.metrics().splitlines() if label in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{re.escape(name)}[{{ ]", line))


@contextmanager
def serving(model: Path, log: Path, *arguments: str) -> Iterator[Server]:
    """A server that answers; gone afterwards. Arguments as for ``Server``."""
    server = Server(model, log, *arguments)
    try:
        server.wait()
        yield server
    finally:
        server.stop()
