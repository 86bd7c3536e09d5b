"""What checking copies below the cut could save at best, replayed on real answers with measured times.

    python -m benchmarks.cascade ANSWERS.jsonl --times STEP-TIMES.json --out RESULT.json

Prompt lookup's copies go through all layers. A cascade would ask the exit head about them once they have passed the
first layers, and send on what it finds right. Here the head is always right about copies, in one pass over all of
them, whatever was copied before: a bound that no head reaches. Copies are those that ``auto`` makes, or all that are
found, whichever is faster with the check. Neither side drafts with the head.

ANSWERS.jsonl is that of a folder of ``vllm-earlyexit collect --sampled 0``, the times are what a server that ran on
this machine has left in vLLM's cache folder, under ``self_exit``.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.results import write_result
from vllm_earlyexit.engine.cost import Acceptance, PartTimes, StepTimes
from vllm_earlyexit.engine.lookup import Repeat, repeat_in
from vllm_earlyexit.engine.policy import AutoPolicy
from vllm_earlyexit.training.records import read_records


@dataclass
class Request:
    """A request whose answer is known.

    Attributes:
        tokens: Prompt and answer, int64 [n].
        length: How many of them are there so far.
    """

    tokens: np.ndarray
    length: int

    def repeat(self, most: int) -> Repeat:
        """Return what followed when the newest tokens last occurred, no longer than the answer still is."""
        return repeat_in(self.tokens[: self.length], min(most, len(self.tokens) - self.length - 1))

    def right(self, copied: Sequence[int]) -> int:
        """Return how many of these tokens come next."""
        follow = self.tokens[self.length : self.length + len(copied)].tolist()
        return next((n for n, (a, b) in enumerate(zip(copied, follow, strict=True)) if a != b), len(copied))


@dataclass
class Replayed:
    """What a replay came to."""

    tokens: int = 0
    seconds: float = 0.0
    copied: int = 0
    accepted: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class World:
    """What a round takes.

    Attributes:
        times: Of a step's parts.
        around: Seconds of a round beside the model.
        overhead: Seconds that one more pass takes beside its layers and head.
        longest: Longest copy.
    """

    times: StepTimes
    around: float
    overhead: float
    longest: int

    def plain(self, width: int) -> float:
        """Return the seconds of a round without copies."""
        return self.around + float(self.times.at("plain", width))

    def more(self, part: str, width: int, added: int) -> float:
        """Return the seconds that a part takes longer for so many more tokens."""
        return float(self.times.at(part, width + added) - self.times.at(part, width))

    def replay(self, answers: Sequence[Request], concurrency: int, *, check: bool, everything: bool) -> Replayed:
        """Answer all requests, so many at a time.

        Args:
            answers: Requests, each with its first token.
            concurrency: Requests at a time.
            check: Whether a head that is always right drops wrong copies below the cut.
            everything: Whether all that is found is copied, instead of what ``auto`` copies.
        """
        never = Acceptance([[0.0, 1.0]], [[0.0, 0.0]])
        done = Replayed()
        policy = AutoPolicy([never], self.longest, lambda: done.seconds)
        policy.times = [self.times]
        waiting, running = [Request(one.tokens, one.length) for one in reversed(answers)], list[Request]()
        while waiting or running:
            while waiting and len(running) < concurrency:
                running.append(waiting.pop())
            width = len(running)
            found = [one.repeat(self.longest) for one in running]
            copied = self._copied(policy, found, everything)
            right = {row: running[row].right(found[row].tokens[:count]) for row, count in copied.items()}
            added, kept = sum(copied.values()), sum(right.values())
            done.seconds += self.plain(width)
            if added:
                done.seconds += self.more("shallow", width, added) + self.more("deep", width, kept if check else added)
                done.seconds += float(self.times.at("head", added)) + self.overhead if check else 0.0
            for row, one in enumerate(running):
                if row in copied:
                    policy.learn(row, copied[row], right[row])
                new = min(1 + right.get(row, 0), len(one.tokens) - one.length)
                one.length += new
                done.tokens += new
            done.copied, done.accepted = done.copied + added, done.accepted + kept
            running = [one for one in running if one.length < len(one.tokens)]
        return done

    @staticmethod
    def _copied(policy: AutoPolicy, found: Sequence[Repeat], everything: bool) -> dict[int, int]:
        """Return how many tokens are copied for which rows."""
        if everything:
            return {row: len(repeat.tokens) for row, repeat in enumerate(found) if repeat.tokens}
        if not policy.start(len(found)):
            return {}
        policy.begin(lambda: found)
        return dict(policy.copied)


def main(
    answers: Path,
    times: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    concurrency: Annotated[list[int] | None, typer.Option(help="By default 1, 2, 4, 8, 16, 32.")] = None,
    exit_number: Annotated[int, typer.Option(help="Which exit of the times, counted from 0.")] = 0,
    around_ms: Annotated[float, typer.Option(help="Of a round beside the model, as in a time split.")] = 1.9,
    overhead_ms: Annotated[float, typer.Option(help="Of a pass beside its layers and head (benchmarks.steps).")] = 0.6,
    longest: Annotated[int, typer.Option(help="Longest copy.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Longest answer; small models end in loops.")] = 128,
) -> None:
    """Replay with and without the check."""
    parts = PartTimes.of(json.loads(times.read_text()))
    world = World(parts.of_exit(exit_number), around_ms / 1e3, overhead_ms / 1e3, longest)
    known_answers = ((one["ids"], one["answer_start"]) for one in read_records(answers))
    items = [Request(np.array(ids[: start + max_tokens]), start + 1) for ids, start in known_answers]
    items = [one for one in items if one.length < len(one.tokens)]
    rows = []
    for width in concurrency or [1, 2, 4, 8, 16, 32]:
        plain = World(world.times, world.around, world.overhead, 0).replay(items, width, check=False, everything=True)
        without = world.replay(items, width, check=False, everything=False)
        checked = [world.replay(items, width, check=True, everything=all_) for all_ in (False, True)]
        best = max(checked, key=lambda one: one.tokens_per_s)
        rows.append(
            {
                "concurrency": width,
                "plain_tokens_per_s": round(plain.tokens_per_s, 2),
                "copies": round(without.tokens_per_s / plain.tokens_per_s, 4),
                "copies_accepted": round(without.accepted / max(1, without.copied), 4),
                "checked_copies": round(best.tokens_per_s / plain.tokens_per_s, 4),
                "copies_everything": best is checked[1],
                "check_saves_at_most": round(best.tokens_per_s / without.tokens_per_s - 1, 4),
            }
        )
    measured = {
        "answers": len(items),
        "max_tokens": max_tokens,
        "longest": longest,
        "step_times": asdict(world.times),
        "rows": rows,
    }
    write_result(out, "cascade", measured)


if __name__ == "__main__":
    typer.run(main)
