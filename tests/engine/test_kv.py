"""Drafting writes the very KV entries below the cut that verification writes."""

from pathlib import Path
from typing import Any

import torch

from tests.engine.conftest import engine, runner_of

GARBAGE = 1e4
NOISE = 1e-4


class Watch:
    """Compares, around each step, what drafting wrote with what the next verification writes.

    After every draft the entries that it changed are overwritten by garbage, so that equality after verification
    proves that verification wrote them too.
    """

    def __init__(self, runner: Any, layer_names: list[str]):
        context = runner.vllm_config.compilation_config.static_forward_context
        self.caches: list[torch.Tensor] = [context[name].kv_cache for name in layer_names]
        self.drafted: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.compared = 0
        self.worst = 0.0
        self._propose, self._context = runner.drafter.propose, runner.drafter._kv_context
        runner.drafter.propose, runner.drafter._kv_context = self.propose, self.context
        self.fed = 0

    def context(self, runner: Any, rows: torch.Tensor, step: Any) -> Any:
        self.fed += len(step.rows)
        return self._context(runner, rows, step)

    def propose(self, *args: Any) -> list[list[int]]:
        for cache, (changed, values) in zip(self.caches, self.drafted, strict=False):
            if len(values):
                self.worst = max(self.worst, float((cache[changed] - values).abs().max()))
                self.compared += len(values)
        before = [cache.clone() for cache in self.caches]
        self.fed = 0
        drafts = self._propose(*args)
        self.drafted = []
        for cache, old in zip(self.caches, before, strict=True):
            changed = cache != old
            entries = self.fed * cache.shape[1] * cache.shape[3]
            # A rejected draft of an earlier round may have left the very same entry behind.
            assert 0.5 * entries <= int(changed.sum()) <= entries, "drafting wrote too little, or elsewhere"
            self.drafted.append((changed, cache[changed].clone()))
            cache[changed] = GARBAGE
        return drafts


def test_drafted_kv_equals_verified_kv(smollm2: Path, prompts: list[str]):
    from vllm import SamplingParams

    setting = {"method": "self_exit", "policy": "fixed", "num_speculative_tokens": 3}
    with engine(smollm2, speculative_config=setting, num_gpu_blocks_override=64) as llm:
        runner = runner_of(llm)
        shallow = runner.drafter.drafter.shallow.layer_names
        assert len(shallow) == runner.drafter.config.exit_layer
        watch = Watch(runner, shallow)
        messages: list[Any] = [[{"role": "user", "content": p}] for p in prompts[:3]]
        # No stop token: with one, a request could end between a draft and its verification.
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        outputs = llm.chat(messages, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == 24 for output in outputs)
    assert watch.compared > 10_000
    assert watch.worst < NOISE
