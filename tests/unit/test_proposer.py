from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_earlyexit.config import EarlyExitConfig
from vllm_earlyexit.engine.frontier import Frontier
from vllm_earlyexit.engine.rounds import Round, SelfExit, Verified


class Rests:
    """A drafter that does not draft."""

    def starts(self, num_seqs: int, context: int) -> bool:
        return False


class Listener:
    """A policy that takes note of what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def learn(self, *what: int) -> None:
        self.told.append(what)

    def interrupt(self) -> None:
        self.told.append("interrupted")

    def note_prompts(self) -> None:
        self.told.append("prompts")


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ("ab", "ab", [(0, 3, 1), (1, 2, 2)]),
        ("ab", "b", [(1, 3, 1)]),
        ("b", "ab", ["prompts", (0, 2, 2)]),
        ("", "ab", ["interrupted"]),
        ("b", "a", ["interrupted"]),
    ],
    ids=["the same requests", "one is done", "one is new", "no round before", "a pause between"],
)
def test_the_policy_hears_of_requests_that_were_not_in_the_last_round(before: str, now: str, told: list[Any]):
    requests = {name: object() for name in "ab"}
    policy = Listener()
    ours = SelfExit.__new__(SelfExit)
    ours.drafter = SimpleNamespace(policy=policy)  # type: ignore[assignment]
    places = [0] * len(before)
    seen = [requests[name] for name in before]
    ours.config = EarlyExitConfig("heads", (1,), 4, "auto")
    ours._verifying = Round(Frontier(places, places, places, "cpu"), seen, []) if before else None
    batch = [requests[name] for name in now]
    ours.learn([Verified(request, "", *of) for request, of in zip(batch, [(3, 1), (2, 2)], strict=False)], batch)
    assert policy.told == told


def test_a_round_without_drafts_does_not_look_at_its_sequences():
    ours = SelfExit.__new__(SelfExit)
    ours.drafter, ours.config = Rests(), EarlyExitConfig("heads", (1,), 4, "auto")  # type: ignore[assignment]
    requests = [object(), object()]
    assert ours.draft(SimpleNamespace(device="cpu"), requests, pytest.fail, pytest.fail) == [[], []]  # type: ignore[arg-type]
    assert ours.resume(None, pytest.fail, torch.zeros(2), torch.zeros(2)) is None  # type: ignore[arg-type]
    ours.drafter = SimpleNamespace(policy=(policy := Listener()))  # type: ignore[assignment]
    ours.learn([Verified(request, "", 0, 0) for request in requests], requests)
    assert not policy.told, "it is a round like any other, of which the time counts"
