"""Plain vLLM's greedy answers, and what excuses a difference from them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MAX_TOKENS = 64
NEAR_TIE = 1e-3


def answer(llm: Any, prompts: list[str], batch_size: int) -> list[list[int]]:
    """Answer ``prompts`` greedily, at most ``batch_size`` at a time."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = []
    for start in range(0, len(prompts), batch_size):
        messages: list[Any] = [[{"role": "user", "content": p}] for p in prompts[start : start + batch_size]]
        outputs += [list(o.outputs[0].token_ids) for o in llm.chat(messages, params, use_tqdm=False)]
    return outputs


@dataclass
class Reference:
    """Plain vLLM's answers by batch size, and transformers to judge near ties."""

    folder: Path
    prompts: list[str]
    answers: dict[int, list[list[int]]]
    compared: int = 0
    excused: int = 0
    _model: Any = field(default=None, repr=False)

    def near_tie(self, prompt: str, left: list[int], right: list[int]) -> bool:
        """Whether two answers part where the full model's two best logits are within NEAR_TIE."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if self._model is None:
            self._model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        same = next(n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
        with torch.no_grad():
            logits = self._model(torch.tensor([ids + left[:same]])).logits[0, -1]
        best = logits.topk(2)
        return {left[same], right[same]} == set(best.indices.tolist()) and float(-best.values.diff()) <= NEAR_TIE

    def check(self, answers: list[list[int]], batch_size: int) -> None:
        """Assert identity but for proven near ties, which are counted."""
        pairs = zip(self.prompts, self.answers[batch_size], answers, strict=True)
        different = [(prompt, plain, ours) for prompt, plain, ours in pairs if plain != ours]
        for prompt, plain, ours in different:
            assert self.near_tie(prompt, plain, ours), f"not a near tie: {prompt[:60]!r}"
        self.compared += len(answers)
        self.excused += len(different)
