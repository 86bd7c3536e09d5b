"""Who runs the model for training records: vLLM, or transformers where vLLM is not installed."""

import functools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.fingerprint import architectures, text_config
from vllm_earlyexit.training.data import Window, grouped
from vllm_earlyexit.training.shards import Batch, RecordsConfig, concatenate, window_key
from vllm_earlyexit.training.targets import top_of, top_targets

if TYPE_CHECKING:
    from vllm_earlyexit.engine.recorder import Observed

MODEL_LENGTH = 4096
KV_CACHE = 2 << 30
NUM_SEQS = 128


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


@dataclass(frozen=True)
class Answer:
    """A model's answer to a prompt.

    Attributes:
        number: Of the prompt.
        ids: Tokens of the answer.
        observed: What the model computed for prompt and answer, the last token excepted; None if there is no answer.
    """

    number: int
    ids: list[int]
    observed: "Observed | None"


class Source(Protocol):
    """Who runs the model."""

    tokenizer: Any

    def answer(self, prompts: list[list[int]], sampled: list[bool], options: CollectOptions) -> Iterator[Answer]:
        """Answer prompts given as token ids; yield answers as they are complete."""

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
            async_scheduling=False,  # a step would run on after a sequence's end
            enable_prefix_caching=False,
            max_model_len=longest,
            max_num_batched_tokens=longest,
            max_num_seqs=NUM_SEQS,
            kv_cache_memory_bytes=KV_CACHE,
            seed=options.seed,
        )
        self.tokenizer = self._llm.get_tokenizer()
        self._runner: Any = self._llm.collective_rpc(_runner_of)[0]
        self._number = 0

    def answer(self, prompts: list[list[int]], sampled: list[bool], options: CollectOptions) -> Iterator[Answer]:
        """Answer prompts, recording on the way; one that leaves no room for an answer gets an empty one, at once."""
        asked = []
        for number, prompt in enumerate(prompts):
            temperature = options.temperature if sampled[number] else 0
            if len(prompt) + options.answer_tokens <= self._longest:
                asked.append((number, prompt, temperature, options.answer_tokens))
            else:
                yield Answer(number, [], None)
        if options.max_tokens is None:
            # One that is sampled makes vLLM draw random numbers for the whole batch; where all will run, they run last.
            asked.sort(key=lambda one: one[2])
        yield from self._run(asked)

    def _run(self, asked: Sequence[tuple[int, list[int], float, int]]) -> Iterator[Answer]:
        """Run (number, prompt, temperature, most tokens), ``NUM_SEQS`` at a time; yield what is complete."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        self._runner.model.record(self._runner, functools.partial(top_of, top_k=self._config.top_k))
        waiting, running = deque(asked), dict[str, tuple[int, str]]()
        try:
            while waiting or running:
                while waiting and len(running) < NUM_SEQS:
                    number, prompt, temperature, most = waiting.popleft()
                    name, self._number = str(self._number), self._number + 1
                    params = SamplingParams(
                        temperature=temperature,
                        max_tokens=most,
                        detokenize=False,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    )
                    inside = engine.add_request(name, {"prompt_token_ids": prompt}, params)
                    running[name] = number, inside
                for output in engine.step():
                    if output.finished:
                        number, inside = running.pop(output.request_id)
                        completion = cast(Any, output).outputs[0]
                        yield Answer(number, list(completion.token_ids), self._runner.model.take(inside))
        finally:
            if running:
                engine.abort_request(list(running))

    def observe(self, windows: list[Window]) -> Batch:
        """Prefill the windows and return what passed by."""
        done = {
            answer.number: answer.observed for answer in self._run([(n, w.ids, 0, 1) for n, w in enumerate(windows)])
        }
        found = [observed for _, observed in sorted(done.items()) if observed is not None]
        scored = torch.tensor([flag for window in windows for flag in window.scored])
        final = torch.cat([observed.final for observed in found])
        model = self._runner.model
        with torch.inference_mode():
            rows = final[scored].to(self._runner.device)
            top_ids, top_p = top_targets(rows, model.compute_logits, self._config.vocab_size, self._config.top_k)
        return Batch(
            windows=torch.tensor([window_key(window) for window in windows]),
            lengths=torch.tensor([len(window.ids) for window in windows]),
            ids=torch.cat([observed.ids for observed in found]),
            scored=scored,
            hidden={layer: torch.cat([o.hidden[layer] for o in found]) for layer in self._config.layers},
            final=final,
            top_ids=top_ids,
            top_p=top_p,
        )


def _runner_of(worker: Any) -> Any:
    return worker.model_runner


def as_batch(windows: list[Window], observed: "Observed") -> Batch:
    """Return what was observed of one answer as a batch of the stretches into which it was cut."""
    at = torch.cat([torch.arange(window.start, window.start + len(window.ids)) for window in windows])
    scored = torch.tensor([flag for window in windows for flag in window.scored])
    top_ids, top_p = zip(*(observed.top[position] for position in at[scored].tolist()), strict=True)
    return Batch(
        windows=torch.tensor([window_key(window) for window in windows]),
        lengths=torch.tensor([len(window.ids) for window in windows]),
        ids=observed.ids[at],
        scored=scored,
        hidden={layer: states[at] for layer, states in observed.hidden.items()},
        final=observed.final[at],
        top_ids=torch.stack(top_ids),
        top_p=torch.stack(top_p),
    )


class TransformersSource:
    """transformers, where vLLM is not installed; it records texts and conversations and answers no prompts."""

    def __init__(self, folder: Path, config: RecordsConfig, device: str):
        from transformers import AutoTokenizer

        from vllm_earlyexit.training.teacher import Teacher

        self._config = config
        self._teacher = Teacher(folder, device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def answer(self, prompts: list[list[int]], sampled: list[bool], options: CollectOptions) -> Iterator[Answer]:
        """Not offered: it would take hours where vLLM takes minutes."""
        raise EarlyExitError("answering prompts needs vLLM; install it, or give --data with the model's own answers")

    def observe(self, windows: list[Window]) -> Batch:
        """Run the windows in padded batches."""
        parts = [
            self._teacher.observe(group, self._config.exit_layers, self._config.top_k)
            for group in grouped(sorted(windows, key=lambda window: len(window.ids)), 4096)
        ]
        return concatenate(parts)
