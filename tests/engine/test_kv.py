"""Drafting and resumed verification together write the KV entries of plain decoding, and compute nothing twice."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import counters, engine, runner_of
from tests.engine.heads import LADDER
from vllm_earlyexit.engine.models import Segment

NOISE = 1e-4
PROMPTS = 5
BLOCK = 32


class Snapshots:
    """Keeps, after every step, the KV blocks of each request that verified tokens fill, in every layer.

    Blocks are compared whole, because the CPU's attention orders a block's entries as it likes.
    """

    def __init__(self, runner: Any):
        self._runner, self._propose = runner, runner.drafter.propose
        context = runner.vllm_config.compilation_config.static_forward_context
        self._caches = [context[name].kv_cache for group in runner.attn_groups[0] for name in group.layer_names]
        self.kept: dict[tuple[int, ...], torch.Tensor] = {}
        runner.drafter.propose = self.propose

    def propose(self, *arguments: Any) -> list[list[int]]:
        batch = self._runner.input_batch
        assert self._caches[0].shape[2] == BLOCK
        for row in range(batch.num_reqs):
            full = (int(batch.num_tokens_no_spec[row]) - 1) // BLOCK  # the newest token has no KV yet
            table = batch.block_table[0].get_device_tensor(batch.num_reqs)[row, :full].long()
            tokens = tuple(batch.token_ids_cpu[row, : full * BLOCK].tolist())
            self.kept[tokens] = torch.stack([cache[table] for cache in self._caches])
        return self._propose(*arguments)


class Fed:
    """Counts the tokens that pass through each segment, by its first layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.tokens: Counter[int] = Counter()
        run = Segment.__call__

        def counting(segment: Segment, *arguments: Any) -> Any:
            self.tokens[segment.start] += len(arguments[1])
            return run(segment, *arguments)

        monkeypatch.setattr(Segment, "__call__", counting)


FIXED = {"method": "self_exit", "policy": "fixed", "num_speculative_tokens": 3}
LADDERED = FIXED | {"policy": "entropy", "target_accuracy": 0.8, "exit_layer": LADDER}


@pytest.mark.parametrize(
    ("chunk", "laddered"),
    [(2048, False), (40, False), (40, True)],
    ids=["decode-only", "mixed with prefill chunks", "mixed, ladder of exits"],
)
def test_resumed_kv_is_that_of_a_whole_forward(
    smollm2: Path, prompts: list[str], ladder: str, chunk: int, laddered: bool
):
    from vllm import SamplingParams

    setting = LADDERED | {"model": ladder} if laddered else FIXED
    arguments = {"enable_prefix_caching": False, "max_num_batched_tokens": chunk, "block_size": BLOCK}
    with engine(smollm2, speculative_config=setting, **arguments) as llm:
        watch = Snapshots(runner_of(llm))
        messages: list[Any] = [[{"role": "user", "content": p}] for p in prompts[:PROMPTS]]
        outputs = llm.chat(messages, SamplingParams(temperature=0, max_tokens=80, ignore_eos=True), use_tqdm=False)
        assert counters(llm)["accepted_tokens"] > 0
        answered = dict(watch.kept)
        whole: list[Any] = [
            {"prompt_token_ids": [*output.prompt_token_ids, *output.outputs[0].token_ids]} for output in outputs
        ]
        watch.kept.clear()
        llm.generate(whole, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        beyond_prompt = 0
        prompt_lengths = {tuple(o.prompt_token_ids[:BLOCK]): len(o.prompt_token_ids) for o in outputs}
        for tokens, blocks in answered.items():
            if not tokens:
                continue
            reference = next(kept for known, kept in watch.kept.items() if known[: len(tokens)] == tokens)
            assert (blocks - reference[:, : blocks.shape[1]]).abs().max() < NOISE
            beyond_prompt += len(tokens) - prompt_lengths[tokens[:BLOCK]] > BLOCK
        assert beyond_prompt >= PROMPTS  # blocks in which every token was drafted or verified


@pytest.mark.parametrize("laddered", [False, True], ids=["one exit", "ladder of exits"])
def test_nothing_is_computed_twice(
    smollm2: Path, prompts: list[str], ladder: str, monkeypatch: pytest.MonkeyPatch, laddered: bool
):
    from vllm import SamplingParams

    setting = LADDERED | {"model": ladder} if laddered else FIXED
    with engine(smollm2, speculative_config=setting, enable_prefix_caching=False) as llm:
        fed = Fed(monkeypatch)
        messages: list[Any] = [[{"role": "user", "content": p}] for p in prompts[:PROMPTS]]
        outputs = llm.chat(messages, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
        counted = counters(llm)
    verified = sum(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) - 1 for o in outputs)
    rejected = counted["draft_tokens"] - counted["accepted_tokens"]
    assert len(fed.tokens) == (3 if laddered else 2)
    for count in fed.tokens.values():  # tokens accepted past the end of an answer are verified and thrown away
        assert verified + rejected <= count <= verified + rejected + 3 * PROMPTS
    assert len(set(fed.tokens.values())) == 1


def test_pending_states_are_bounded(smollm2: Path, prompts: list[str]):
    from vllm import SamplingParams

    sizes = []
    with engine(smollm2, speculative_config=FIXED, max_num_seqs=3) as llm:
        runner = runner_of(llm)
        forward = runner.drafter.forward

        def watch(*arguments: Any) -> Any:
            if runner.drafter._round is not None:
                sizes.append(runner.drafter._round.frontier.state_shape)
            return forward(*arguments)

        runner.drafter.forward = watch
        messages: list[Any] = [[{"role": "user", "content": p}] for p in prompts[:PROMPTS]]
        llm.chat(messages, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert max(sizes) == (3, 4, 576)
