"""Whether two greedy answers part where the full model is all but undecided."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

NEAR_TIE = 1e-3


class NearTies:
    """A judge of greedy answers to chat prompts, with transformers' float32 model, loaded when it is first needed.

    Args:
        folder: Of the model.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32)
        return AutoTokenizer.from_pretrained(self._folder), model

    def excuses(self, prompt: str, left: list[int], right: list[int]) -> bool:
        """Whether two answers part at the full model's two best tokens, whose logits are within ``NEAR_TIE``."""
        same = next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
        if same is None:  # one is cut short
            return False
        tokenizer, model = self._loaded
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        with torch.no_grad():
            best = model(torch.tensor([ids + left[:same]])).logits[0, -1].topk(2)
        return {left[same], right[same]} == set(best.indices.tolist()) and float(-best.values.diff()) <= NEAR_TIE
