"""Who runs the model for training records: vLLM, or transformers where vLLM is not installed."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.fingerprint import architectures, text_config
from vllm_earlyexit.training.data import Window, grouped
from vllm_earlyexit.training.shards import Batch, RecordsConfig, concatenate, window_key
from vllm_earlyexit.training.targets import top_targets

MODEL_LENGTH = 4096
KV_CACHE = 2 << 30


@dataclass(frozen=True)
class CollectOptions:
    """Knobs of collecting.

    Attributes:
        window: Longest stretch of a document that is run at once, in tokens.
        top_k: Target probabilities kept for each scored token.
        shard_tokens: Tokens of a shard, and with it the memory that recording takes.
        max_tokens: Record about so many tokens in all.
        answer_tokens: Longest answer to a prompt.
        sampled: Share of the prompts answered at ``temperature``; the others are answered greedily.
        temperature: Of sampled answers.
        num_prompts: Use the first so many prompts of each file.
        seed: Of sampled answers.
        eager: Do not let vLLM compile the model: starts sooner, runs slower.
    """

    window: int = 512
    top_k: int = 32
    shard_tokens: int = 16384
    max_tokens: int | None = None
    answer_tokens: int = 384
    sampled: float = 0.25
    temperature: float = 0.6
    num_prompts: int | None = None
    seed: int = 0
    eager: bool = False


class Source(Protocol):
    """Who runs the model."""

    tokenizer: Any

    def answer(self, prompts: list[list[int]], sampled: list[bool], options: CollectOptions) -> list[list[int]]:
        """Answer prompts given as token ids; return the answers' token ids."""

    def observe(self, windows: list[Window]) -> Batch:
        """Run whole windows through the full model."""


class ServingSource:
    """vLLM, offline and in this process."""

    def __init__(self, folder: Path, config: RecordsConfig, options: CollectOptions):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # records are taken from the model in this process
        from vllm import LLM
        from vllm.platforms import current_platform

        from vllm_earlyexit.engine.recorder import register_recorder
        from vllm_earlyexit.training.teacher import compute_dtype

        longest = min(MODEL_LENGTH, text_config(folder).get("max_position_embeddings", MODEL_LENGTH))
        self._config, self._longest = config, longest
        self._llm = LLM(
            str(folder),
            dtype=cast(Any, compute_dtype(current_platform.device_type)),
            enforce_eager=options.eager,
            hf_overrides={"architectures": [register_recorder(architectures(folder), config.layers)]},
            enable_chunked_prefill=False,
            enable_prefix_caching=False,
            max_model_len=longest,
            max_num_batched_tokens=longest,
            max_num_seqs=256,
            kv_cache_memory_bytes=KV_CACHE,
            seed=options.seed,
        )
        self.tokenizer = self._llm.get_tokenizer()

    def answer(self, prompts: list[list[int]], sampled: list[bool], options: CollectOptions) -> list[list[int]]:
        """Answer in one batch; a prompt that leaves no room for an answer gets an empty one."""
        from vllm import SamplingParams

        fits = [n for n, prompt in enumerate(prompts) if len(prompt) + options.answer_tokens <= self._longest]
        params = [
            SamplingParams(
                temperature=options.temperature if sampled[n] else 0,
                max_tokens=options.answer_tokens,
                detokenize=False,
            )
            for n in fits
        ]
        inputs: list[Any] = [{"prompt_token_ids": prompts[n]} for n in fits]
        answers: list[list[int]] = [[] for _ in prompts]
        for n, output in zip(fits, self._llm.generate(inputs, params, use_tqdm=False), strict=True):
            answers[n] = list(output.outputs[0].token_ids)
        return answers

    def observe(self, windows: list[Window]) -> Batch:
        """Prefill the windows and return what passed by, in vLLM's order."""
        from vllm import SamplingParams

        by_tokens = {tuple(window.ids): window for window in windows}
        inputs: list[Any] = [{"prompt_token_ids": list(ids)} for ids in by_tokens]
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        self._llm.apply_model(_record)
        self._llm.generate(inputs, params, use_tqdm=False)
        seen = self._llm.apply_model(_take)[0]
        found = [by_tokens[tuple(prefill.ids.tolist())] for prefill in seen]
        scored = torch.tensor([flag for window in found for flag in window.scored])
        final = torch.cat([prefill.final for prefill in seen])
        top_ids, top_p = self._llm.apply_model(
            lambda model: top_targets(final[scored.to(final.device)], _unembed(model), self._config.top_k)
        )[0]
        return Batch(
            windows=torch.tensor([window_key(window) for window in found]),
            lengths=torch.tensor([len(window.ids) for window in found]),
            ids=torch.cat([prefill.ids for prefill in seen]).to("cpu", torch.int32),
            scored=scored,
            hidden={
                layer: torch.cat([prefill.hidden[layer] for prefill in seen]).cpu() for layer in self._config.layers
            },
            final=final.cpu(),
            top_ids=top_ids,
            top_p=top_p,
        )


def _record(model: Any) -> None:
    model.record()


def _take(model: Any) -> list[Any]:
    return model.take()


def _unembed(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return model.compute_logits


class TransformersSource:
    """transformers, where vLLM is not installed; it records texts and conversations and answers no prompts."""

    def __init__(self, folder: Path, config: RecordsConfig, device: str):
        from transformers import AutoTokenizer

        from vllm_earlyexit.training.teacher import Teacher

        self._config = config
        self._teacher = Teacher(folder, device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def answer(self, prompts: list[list[int]], sampled: list[bool], options: CollectOptions) -> list[list[int]]:
        """Not offered: it would take hours where vLLM takes minutes."""
        raise EarlyExitError("answering prompts needs vLLM; install it, or give --data with the model's own answers")

    def observe(self, windows: list[Window]) -> Batch:
        """Run the windows in padded batches."""
        parts = [
            self._teacher.observe(group, self._config.exit_layers, self._config.top_k)
            for group in grouped(sorted(windows, key=lambda window: len(window.ids)), 4096)
        ]
        return concatenate(parts)
