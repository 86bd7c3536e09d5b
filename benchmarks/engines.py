"""What the throughput benchmark compares: each configuration as an engine that answers prompts and counts."""

import inspect
import os
import re
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, cycle, islice
from typing import Any, Protocol
from unittest.mock import patch

from benchmarks.oracle import PLAIN, Oracle
from vllm_earlyexit.engine.early_exit import ACCURACY, EarlyExits
from vllm_earlyexit.engine.lookup import LONGEST
from vllm_earlyexit.heads.fingerprint import model_folder, text_config

EARLY = ("early", "early-heads", "oracle")
DTYPES = ("bfloat16", "float32")
"""What a configuration's name may end with, after an @."""


@dataclass
class Run:
    """One pass over the prompts at one concurrency.

    Attributes:
        seconds: From the first request to the last token.
        outputs: Generated token ids, prompt by prompt.
        drafts: Rounds in which something was drafted.
        drafted: Draft tokens verified.
        accepted: Draft tokens accepted.
        accepted_at: Draft tokens accepted at each draft position.
        split: Seconds by part of a step, if asked for.
        predicted: Seconds that the cost model expected rounds to take.
        measured: Seconds that these rounds took.
        early: What early exits counted; see ``engine.early_exit``.
    """

    seconds: float
    outputs: list[list[int]]
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    split: dict[str, float] = field(default_factory=dict)
    predicted: float = 0.0
    measured: float = 0.0
    early: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Generated tokens."""
        return sum(map(len, self.outputs))


@dataclass(frozen=True)
class Setup:
    """What all configurations of a benchmark share.

    Attributes:
        model: Folder or Hub id.
        heads: Folder of exit heads; None for the shipped ones.
        dtype: Of the engine.
        compiled: Whether vLLM compiles the model.
        max_tokens: Longest answer.
        max_num_seqs: Largest concurrency.
        max_model_len: Prompt and answer.
        memory_share: Of an accelerator's memory, for each engine; None for vLLM's default.
        min_tokens: Shortest length at which answers are cut off; None for ``max_tokens``, so that all are alike.
        prefix_caching: Whether vLLM caches prefixes, also from pass to pass: warm, a pass only decodes.
        context: Tokens that prompts are lengthened to; see ``lengthened``.
    """

    model: str
    heads: str | None
    dtype: str
    compiled: bool
    max_tokens: int
    max_num_seqs: int
    max_model_len: int
    memory_share: float | None = None
    min_tokens: int | None = None
    prefix_caching: bool = False
    context: int = 0

    def length(self, prompt: str) -> int:
        """Return at how many tokens the answer to a prompt is cut off: evenly distributed, the same in every run."""
        least = self.max_tokens if self.min_tokens is None else self.min_tokens
        return least + zlib.crc32(prompt.encode()) % (self.max_tokens - least + 1)


class Engine(Protocol):
    """Answers prompts greedily."""

    def run(self, prompts: list[str], concurrency: int, split: bool = False) -> Run:
        """Answer all prompts, ``concurrency`` at a time."""

    def limit(self, length: int) -> None:
        """Draft at most so many tokens from now on."""

    def ask(self, extra_args: dict[str, Any]) -> None:
        """Ask for this with every request from now on."""


LAYER = re.compile(r"\blayers\.(\d+)\.")
LOWEST = 0.5
"""Lowest accuracy that an engine for early exits allows."""


def named_dtype(config: str) -> tuple[str, str | None]:
    """Return a configuration without its dtype, and that dtype, None if it names none."""
    name, _, dtype = config.rpartition("@")
    return (name, dtype) if dtype in DTYPES else (config, None)


def family(config: str) -> tuple[str, int | float | None]:
    """Return what of a configuration decides its engine, and what can be changed afterwards, if anything can.

    That is the draft length of fixed rules, and the accuracy of early exits.
    """
    whole, dtype = named_dtype(config)
    name, *numbers = whole.split(":")
    ending = f"@{dtype}" if dtype else ""
    if whole == "undrafted":
        return config, 0
    if (name, len(numbers)) in (("fixed", 2), ("layerskip", 2), ("ngram", 2)):
        return ":".join([name, *numbers[:-1]]) + ending, int(numbers[-1])
    if name in EARLY and len(numbers) == 2:
        return f"{name}:{numbers[0]}{ending}", float(numbers[1])
    return config, None


def adjust(engine: Engine, changed: int | float | None) -> None:
    """Give an engine another draft length (int) or accuracy of early exits (float); see ``family``."""
    if isinstance(changed, float):
        engine.ask({ACCURACY: changed})
    elif changed is not None:
        engine.limit(changed)


def speculative_config(config: str, setup: Setup) -> dict[str, Any] | None:
    """Return vLLM's ``speculative_config`` for the name of a configuration, without its dtype.

    ``ar``: plain decoding. ``ar-sync``: the same without async scheduling, which self-exit does without, as vLLM on
    CPUs does in any case. ``undrafted``: self-exit that never drafts, to see what it costs then. ``unpadded``:
    self-exit whose passes are run over just their tokens; see ``engine.sizes``. ``self-exit``: as a user gets it.
    ``heads-only``: without prompt lookup. ``self-exit:E`` and ``heads-only:E``: the same from the exit after layer E
    alone. ``entropy``: the calibrated threshold; ``entropy:A``: for accuracy A. ``fixed:E:K``: LayerSkip's rule, K
    tokens after layer E, with our heads. ``layerskip:E:K``: the same with LayerSkip's shared, untrained head; without
    numbers 4 tokens after a quarter of the layers. ``ngram:MIN:K``: vLLM's prompt lookup of K tokens after the
    longest match, which has MIN tokens to as many as ours. ``suffix:K``: vLLM's suffix decoding of at most K tokens,
    which needs the package arctic-inference. ``early:FILL:A``: early exits with this fill-in and
    accuracy A, otherwise as ``self-exit``; ``early-heads:FILL:A``: as ``heads-only``. ``oracle:FILL``: early exits of
    tokens on which head and plain decoding agree. ``depth:N``: plain decoding of the model without its layers from
    the N-th on. ``eagle3:K:HEAD``: vLLM's EAGLE-3, K tokens with the head in this folder or of this Hub id.
    """
    name, *numbers = config.split(":")
    if name == "eagle3" and len(numbers) == 2:
        return {"method": "eagle3", "num_speculative_tokens": int(numbers[0]), "model": numbers[1]}
    ours: dict[str, Any] = {"method": "self_exit"} | ({"model": setup.heads} if setup.heads else {})
    if name in EARLY and numbers:
        fill_in = numbers[0]
        lookup = {"prompt_lookup": False} if name == "early-heads" else {}
        return ours | {"lowest_accuracy": LOWEST, "fill_in": fill_in, "check_rate": 0.05} | lookup
    if name == "entropy" and len(numbers) == 1:
        return ours | {"policy": "entropy", "target_accuracy": float(numbers[0])}
    match name, [int(number) for number in numbers]:
        case ("ar" | "ar-sync", []) | ("depth", [_]):
            return None
        case "unpadded", []:
            return ours
        case "self-exit" | "heads-only", layers:
            chosen = {"exit_layer": layers} if layers else {}
            return ours | chosen | ({"prompt_lookup": False} if name == "heads-only" else {})
        case "undrafted", []:
            return ours | {"policy": "fixed", "num_speculative_tokens": 1}
        case "entropy", []:
            return ours | {"policy": "entropy"}
        case "fixed", [layer, length]:
            return ours | {"policy": "fixed", "exit_layer": layer, "num_speculative_tokens": length}
        case "layerskip", []:
            layers = text_config(model_folder(setup.model))["num_hidden_layers"]
            return speculative_config(f"layerskip:{layers // 4}:4", setup)
        case "layerskip", [layer, length]:
            return {"method": "self_exit", "head": "shared", "exit_layer": layer, "num_speculative_tokens": length}
        case "ngram", [least, length]:
            lookup = {"prompt_lookup_min": least, "prompt_lookup_max": max(least, LONGEST)}
            return {"method": "ngram", "num_speculative_tokens": length} | lookup
        case "suffix", [length]:
            return {"method": "suffix", "num_speculative_tokens": length}
    raise ValueError(
        f"there is no configuration {config!r}; write ar, ar-sync, undrafted, unpadded, self-exit[:LAYER], "
        "heads-only[:LAYER], entropy[:ACCURACY], fixed:LAYER:LENGTH, layerskip[:LAYER:LENGTH], ngram:MIN:LENGTH, "
        "suffix:LENGTH, early:FILL:ACCURACY, early-heads:FILL:ACCURACY, oracle:FILL, depth:LAYERS, "
        "eagle3:LENGTH:HEAD or transformers:LAYER, each with @bfloat16 or @float32 if not in --dtype"
    )


class VLLMEngine:
    """vLLM, in this process."""

    def __init__(self, config: str, setup: Setup):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        from vllm_earlyexit.engine import sizes

        self._setup, self._asked = setup, dict[str, Any]()
        self._plain_outputs: dict[tuple[int, ...], list[int]] = {}
        name, *numbers = config.split(":")
        shallower = {"hf_overrides": {"num_hidden_layers": int(numbers[0])}} if name == "depth" else {}
        shared = {} if setup.memory_share is None else {"gpu_memory_utilization": setup.memory_share}
        waiting = {"async_scheduling": False} if name == "ar-sync" else {}
        if name == "unpadded":
            sizes.MOST = 0
        with without_layers(int(numbers[0])) if name == "depth" else _nothing():
            self._llm: Any = LLM(
                setup.model,
                dtype=setup.dtype,
                enforce_eager=not setup.compiled,
                max_model_len=setup.max_model_len,
                max_num_seqs=setup.max_num_seqs,
                enable_prefix_caching=setup.prefix_caching,
                speculative_config=speculative_config(config, setup),
                disable_log_stats=False,
                **shallower,
                **shared,
                **waiting,
            )
        self._number = 0
        self._oracle = None
        if name == "oracle":
            self._oracle, self._asked = Oracle(adapter_of(self._llm)), {ACCURACY: LOWEST}

    def run(self, prompts: list[str], concurrency: int, split: bool = False) -> Run:
        """Answer all prompts; as soon as one is done the next one starts."""
        tokens = prompt_tokens(self._llm.get_tokenizer(), prompts, self._setup.context)
        asked = [(ids, self._setup.length(prompt)) for ids, prompt in zip(tokens, prompts, strict=True)]
        if self._oracle is not None:
            new = [(prompt, length) for prompt, length in asked if tuple(prompt) not in self._plain_outputs]
            plain = self._answers(new, concurrency, PLAIN)
            self._plain_outputs |= zip((tuple(prompt) for prompt, _ in new), plain, strict=True)
        before, parts, expected, early = self._counts(), {}, self._expected(), self.early_counts()
        with timed_parts(self._llm, parts) if split else _nothing():
            started = time.perf_counter()
            answers = self._answers(asked, concurrency, self._asked)
            seconds = time.perf_counter() - started
        after = self._counts()
        drafts, drafted, accepted, *accepted_at = (now - then for now, then in zip(after, before, strict=True))
        predicted, measured = (now - then for now, then in zip(self._expected(), expected, strict=True))
        left = {name: count - early.get(name, 0) for name, count in self.early_counts().items()}
        return Run(seconds, answers, drafts, drafted, accepted, accepted_at, parts, predicted, measured, left)

    def _answers(
        self, prompts: list[tuple[list[int], int]], concurrency: int, asking: dict[str, Any]
    ) -> list[list[int]]:
        """Answer prompts in so many tokens, as soon as one is done the next one, asking for this with every request."""
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        waiting, first, running = deque(prompts), self._number, 0
        outputs: dict[int, list[int]] = {}
        while waiting or running:
            while waiting and running < concurrency:
                prompt, length = waiting.popleft()
                params = SamplingParams(temperature=0, max_tokens=length, extra_args=asking or None)
                inside = engine.add_request(str(self._number), {"prompt_token_ids": prompt}, params)
                if self._oracle is not None:
                    self._oracle.known[inside] = self._plain_outputs.get(tuple(prompt), ())
                self._number += 1
                running += 1
            for output in engine.step():
                if output.finished:
                    outputs[int(output.request_id)] = list(output.outputs[0].token_ids)
                    running -= 1
        return [outputs[number] for number in range(first, self._number)]

    def limit(self, length: int) -> None:
        """Draft at most so many tokens from now on: what the scheduler asks for beyond that is not drafted."""
        proposer = adapter_of(self._llm)
        propose = type(proposer).propose
        names = list(inspect.signature(propose).parameters)
        at = names.index("longest" if "longest" in names else "num_speculative_tokens")

        def limited(*arguments: Any, **others: Any) -> Any:
            wanted = [proposer, *arguments]
            wanted[at] = min(wanted[at], length)
            return propose(*wanted, **others)

        proposer.propose = limited

    def ask(self, extra_args: dict[str, Any]) -> None:
        """Ask for this with every request from now on; what was learned about early exits is forgotten."""
        self._asked, drafter = extra_args, drafter_of(self._llm)
        drafter.early = EarlyExits(drafter.early._config, drafter.early._positions)

    def text(self, tokens: list[int]) -> str:
        """Return generated tokens as text."""
        return self._llm.get_tokenizer().decode(tokens, skip_special_tokens=True)

    def likelihood(self, prompts: list[str], answers: list[list[int]]) -> tuple[float, float]:
        """Return how likely this engine finds answers, see ``benchmarks.quality.judged``."""
        from vllm import SamplingParams

        asked = prompt_tokens(self._llm.get_tokenizer(), prompts, 0)
        whole: list[Any] = [{"prompt_token_ids": [*p, *a]} for p, a in zip(asked, answers, strict=True)]
        judged = self._llm.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        means, first, count = [], 0, 0
        for prompt, answer, output in zip(asked, answers, judged, strict=True):
            each = output.prompt_logprobs[len(prompt) :]
            said = [places[token] for places, token in zip(each, answer, strict=True)]
            means.append(sum(one.logprob for one in said) / len(said))
            first += sum(one.rank == 1 for one in said)
            count += len(said)
        return sum(means) / len(means), first / count

    def early_counts(self) -> dict[str, float]:
        """Return what early exits have counted so far; empty if there are none."""
        drafter = drafter_of(self._llm)
        return dict(drafter.early.counts) if hasattr(drafter, "early") else {}

    def _expected(self) -> tuple[float, float]:
        policy = getattr(drafter_of(self._llm), "policy", None)
        return getattr(policy, "predicted_seconds", 0.0), getattr(policy, "measured_seconds", 0.0)

    def _counts(self) -> list[int]:
        prefix = "vllm:spec_decode_num_"
        found = {metric.name.removeprefix(prefix): metric for metric in self._llm.get_metrics()}
        totals = [int(getattr(found.get(name), "value", 0)) for name in ("drafts", "draft_tokens", "accepted_tokens")]
        return [*totals, *map(int, getattr(found.get("accepted_tokens_per_pos"), "values", []))]


class TransformersEngine:
    """transformers' own early exit, one prompt at a time."""

    def __init__(self, config: str, setup: Setup):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._setup, self._layer = setup, int(config.split(":")[1])
        self._tokenizer = AutoTokenizer.from_pretrained(setup.model)
        model: Any = AutoModelForCausalLM.from_pretrained(setup.model, dtype=getattr(torch, setup.dtype))
        self._model = model.eval()

    def run(self, prompts: list[str], concurrency: int, split: bool = False) -> Run:
        """Answer all prompts one after the other, whatever ``concurrency``."""
        import torch

        asked, outputs = prompt_tokens(self._tokenizer, prompts, self._setup.context), []
        started = time.perf_counter()
        for prompt, ids in zip(prompts, asked, strict=True):
            answer = self._model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=self._setup.length(prompt),
                do_sample=False,
                assistant_early_exit=self._layer,
            )
            outputs.append(answer[0, len(ids) :].tolist())
        return Run(time.perf_counter() - started, outputs)

    def limit(self, length: int) -> None:
        """transformers chooses by itself."""

    def ask(self, extra_args: dict[str, Any]) -> None:
        """There is nothing to ask of it."""


def runner_of(llm: Any) -> Any:
    """Return the model runner of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def adapter_of(llm: Any) -> Any:
    """Return what drafts in an in-process engine: a proposer on Model Runner V1, a speculator on V2, or None."""
    runner = runner_of(llm)
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)


def drafter_of(llm: Any) -> Any:
    """Return the self-exit drafter of an in-process engine, None if it has none."""
    return getattr(adapter_of(llm), "drafter", None)


def prompt_tokens(tokenizer: Any, prompts: list[str], context: int) -> list[list[int]]:
    """Return the token ids of prompts as a chat asks them, lengthened to ``context``."""
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for prompt in prompts
    ]
    if not context:
        return asked
    return lengthened(asked, [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts], context)


def lengthened(asked: list[list[int]], texts: list[list[int]], length: int) -> list[list[int]]:
    """Return token ids with those of the other prompts' texts, again and again, in front: ``length`` altogether.

    No two begin with the same token, as long as there are tokens enough, so that they have no prefix in common. What is
    longer already stays as it is.
    """
    found, begun = [], set[int]()
    for number, ids in enumerate(asked):
        others = list(chain.from_iterable(texts[number + 1 :] + texts[:number]))
        first = next((at for at, token in enumerate(others) if token not in begun), 0)
        begun.add(others[first])
        found.append([*islice(cycle(others[first:] + others[:first]), max(0, length - len(ids))), *ids])
    return found


def build(config: str, setup: Setup) -> Engine:
    """Return the engine of a configuration; see ``speculative_config``, and ``transformers:E``."""
    name, dtype = named_dtype(config)
    setup = replace(setup, dtype=dtype or setup.dtype)
    return TransformersEngine(name, setup) if name.startswith("transformers") else VLLMEngine(name, setup)


@contextmanager
def without_layers(first: int) -> Iterator[None]:
    """Let vLLM, in this process, overlook the weights of layers from this one on; it refuses what has no place."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    whole = DefaultModelLoader.get_all_weights

    def shallower(*arguments: Any) -> Iterator[tuple[str, Any]]:
        for name, weight in whole(*arguments):
            layer = LAYER.search(name)
            if layer is None or int(layer.group(1)) < first:
                yield name, weight

    with patch.object(DefaultModelLoader, "get_all_weights", shallower):
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def timed(function: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    """Return ``function``, which from now on adds the seconds of its calls to ``seconds[name]``."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    return call


@contextmanager
def timed_parts(llm: Any, parts: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of a step's parts in ``parts`` while an in-process engine runs."""
    runner, drafter = runner_of(llm), drafter_of(llm)
    watched: list[tuple[str, Any, str]] = [("lm_head", runner.model, "compute_logits")]
    if drafter is None:
        watched.append(("layers", runner.model, "forward"))
    else:
        watched += [("head", exit_, "head") for exit_ in drafter.exits]
        segments = [drafter.exits[0].below[0], *drafter.exits[0].above]
        watched += [("deep" if number else "shallow", s._model, "forward") for number, s in enumerate(segments)]
    replaced: list[tuple[Any, str, Any]] = []

    try:
        for part, owner, name in watched:
            replaced.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, timed(getattr(owner, name), parts, part))
        yield
    finally:
        for owner, name, before in replaced:
            delattr(owner, name)
            if before is not None:
                setattr(owner, name, before)
