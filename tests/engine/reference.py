"""Plain vLLM's greedy answers, and what excuses a difference from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.near_ties import NearTies

MAX_TOKENS = 64
FEW = 8
"""How many prompts are asked one at a time where that takes too long for all."""


def answer(llm: Any, prompts: list[str], batch_size: int, max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    """Answer ``prompts`` greedily, at most ``batch_size`` at a time."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    outputs = []
    for start in range(0, len(prompts), batch_size):
        messages: list[Any] = [[{"role": "user", "content": p}] for p in prompts[start : start + batch_size]]
        outputs += [list(o.outputs[0].token_ids) for o in llm.chat(messages, params, use_tqdm=False)]
    return outputs


@dataclass
class Reference:
    """Plain vLLM's answers by batch size, and transformers to judge near ties.

    Attributes:
        folder: Of the model.
        prompts: What was asked.
        answers: By batch size.
        least: How many answers a check must be of.
        most: How many of these may be near ties.
        compared: Answers that were checked.
        excused: How many of them were near ties.
    """

    folder: Path
    prompts: list[str]
    answers: dict[int, list[list[int]]]
    least: int = FEW
    most: int | None = None
    compared: int = 0
    excused: int = 0

    def __post_init__(self) -> None:
        self._near_ties = NearTies(self.folder)

    def check_all(self, llm: Any, alone: int | None = None) -> None:
        """Let an engine answer the prompts in batches, and ``alone`` of them (or all) one at a time; check that."""
        for batch_size in self.answers:
            prompts = self.prompts[:alone] if batch_size == 1 else self.prompts
            self.check(answer(llm, prompts, batch_size), batch_size)

    def check(self, answers: list[list[int]], batch_size: int) -> None:
        """Assert identity of the first prompts' answers but for proven near ties, which are counted."""
        pairs = list(zip(self.prompts, self.answers[batch_size], answers, strict=False))
        assert len(pairs) == len(answers) >= self.least
        different = [(prompt, plain, ours) for prompt, plain, ours in pairs if plain != ours]
        assert self.most is None or len(different) <= self.most
        for prompt, plain, ours in different:
            assert self._near_ties.excuses(prompt, plain, ours), f"not a near tie: {prompt[:60]!r}"
        self.compared += len(answers)
        self.excused += len(different)
