"""Processes that take turns: while one works, all others are stopped with everything that they have started.

An engine that waits is not idle: OpenMP's threads spin, servers poll. So every engine has a session of its own, whose
process group is stopped (SIGSTOP) until it is that engine's turn (SIGCONT).
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm_earlyexit.errors import EarlyExitError

ANSWER = "@answer "  # marks a child's answers among whatever else it prints
GUARD = 'read -r group; read -r end; kill -s KILL -- "-$group"'
"""A shell that ends a group when its own input does, which is when whoever started both has died, however that was.

A process can ask Linux to be ended with its parent, but not for its children, and stopped ones do not see it go.
"""


class Group:
    """A process in a session of its own, with all that it starts: paused, continued and ended together.

    Args:
        command: What it runs.
        options: As for ``subprocess.Popen``.
    """

    def __init__(self, command: Sequence[str], **options: Any):
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self._guard = subprocess.Popen(["sh", "-c", GUARD], stdin=subprocess.PIPE, **silent)  # type: ignore[call-overload]
        try:
            self.process: subprocess.Popen[Any] = subprocess.Popen(command, start_new_session=True, **options)
            self._guard.stdin.write(f"{self.process.pid}\n".encode())
            self._guard.stdin.flush()
        except BaseException:
            self._guard.kill()
            self._guard.wait()
            raise

    def pause(self) -> None:
        """Stop all of its processes; they keep their memory."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Continue all of its processes."""
        self._signal(signal.SIGCONT)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Its turn: it goes on, and is paused again afterwards."""
        self.go_on()
        try:
            yield
        finally:
            self.pause()

    def stop(self, patience: float = 60) -> int:
        """End it, paused or not, and whatever it has started; return its exit code, below 0 if it had to be killed.

        Args:
            patience: Seconds in which it may end by itself.
        """
        if self._guard.returncode is not None:
            return self.process.returncode
        try:
            self.go_on()
            if self.process.poll() is None:
                self._ask_to_end()
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=patience)
        finally:
            self._signal(signal.SIGKILL)
            self.process.wait()
            self._guard.kill()
            self._guard.communicate()
        return self.process.returncode

    def _ask_to_end(self) -> None:
        self.process.terminate()

    def _signal(self, number: int) -> None:
        if self._guard.returncode is None:
            with suppress(ProcessLookupError):  # all of it has ended by itself
                os.killpg(self.process.pid, number)


class Child(Group):
    """A group whose first process answers questions: JSON, a line each; see ``questions`` and ``answer``.

    Args:
        name: What messages call it.
        command: What it runs.
        log: Where all goes that it prints besides answers.
        env: Its environment; None for this process's.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, env: dict[str, str] | None = None):
        self.name, self.log = name, log
        with log.open("w"):
            pass  # empty: both the child and this process append
        pipe = subprocess.PIPE
        with log.open("a") as said:
            super().__init__(command, stdin=pipe, stdout=pipe, stderr=said, text=True, env=env)

    def ask(self, question: Any) -> Any:
        """Return the answer to a question.

        Raises:
            EarlyExitError: it has ended instead; the message names its log.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and so has what it says
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        with self.log.open("a") as log:
            for line in self.process.stdout:
                if line.startswith(ANSWER):
                    return json.loads(line.removeprefix(ANSWER))
                log.write(line)
                log.flush()
        raise EarlyExitError(f"the {self.name} engine stopped; its log {self.log} says why")

    def _ask_to_end(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()


def questions() -> Iterator[Any]:
    """Yield what a child is asked, until it is to end."""
    for line in sys.stdin:
        yield json.loads(line)


def answer(answered: Any) -> None:
    """Answer the question that a child was asked last."""
    print(ANSWER + json.dumps(answered), flush=True)
