from types import SimpleNamespace
from typing import Any

import pytest

from vllm_earlyexit.engine.frontier import Frontier
from vllm_earlyexit.engine.rounds import Round, Sampled, SelfExit, Verified


class Listener:
    """A policy that takes note of what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def learn(self, *what: int) -> None:
        self.told.append(what)

    def interrupt(self) -> None:
        self.told.append("interrupted")


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ("ab", "ab", [(0, 3, 1), (1, 2, 2)]),
        ("ab", "b", [(1, 3, 1)]),
        ("b", "ab", ["interrupted", (0, 2, 2)]),
        ("", "ab", ["interrupted"]),
    ],
    ids=["the same requests", "one is done", "one is new", "no round before"],
)
def test_time_is_learned_from_only_if_every_request_was_in_the_last_round(before: str, now: str, told: list[Any]):
    requests = {name: object() for name in "ab"}
    policy = Listener()
    ours = SelfExit.__new__(SelfExit)
    ours.drafter = SimpleNamespace(policy=policy)  # type: ignore[assignment]
    places = [0] * len(before)
    rows = {id(requests[name]): row for row, name in enumerate(before)}
    sampled = [Sampled(row, requests[name], 0, 0, 0) for row, name in enumerate(before)]
    ours._verifying = Round(Frontier(places, places, places, "cpu"), rows, sampled) if before else None
    batch = [requests[name] for name in now]
    ours.learn([Verified(request, *of) for request, of in zip(batch, [(3, 1), (2, 2)], strict=False)], batch)
    assert policy.told == told
