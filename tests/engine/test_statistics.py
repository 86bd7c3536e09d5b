"""At temperature 1 the outputs follow the full model's distribution exactly."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from tests.engine.conftest import counters, engine
from tests.engine.tiny import tiny_model
from tests.interpreter import ON_V2

VOCAB, LENGTH, SAMPLES = 6, 4, 1_000 if ON_V2 else 25_000
PROMPT = [1, 2, 3]
FALSE_ALARM = 1e-7
"""Probability that a correct sampler fails the test, by the chi-squared limit of Pearson's statistic."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB, layers=2)


@torch.no_grad()
def exact_distribution(model: Path) -> np.ndarray:
    """Return the full model's probability of every continuation, [VOCAB] * LENGTH, in float64."""
    from transformers import AutoModelForCausalLM

    full = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    sequences = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    ids = torch.cat([torch.tensor([PROMPT]).expand(len(sequences), -1), sequences], dim=1)
    log_p = full(ids).logits[:, len(PROMPT) - 1 : -1].log_softmax(dim=-1)
    return log_p.gather(2, sequences.unsqueeze(-1)).sum(dim=(1, 2)).exp().numpy()


def sample(model: Path) -> tuple[np.ndarray, dict[str, int]]:
    """Return how often each continuation was sampled with self-exit, and vLLM's counters."""
    from vllm import SamplingParams

    setting = {"method": "self_exit", "head": "shared", "exit_layer": 1, "num_speculative_tokens": 3}
    arguments: dict[str, Any] = {"max_num_seqs": 512, "max_num_batched_tokens": 4096, "max_model_len": 64}
    with engine(model, skip_tokenizer_init=True, speculative_config=setting, **arguments) as llm:
        params = SamplingParams(temperature=1, max_tokens=LENGTH, ignore_eos=True, detokenize=False)
        prompts: list[Any] = [{"prompt_token_ids": PROMPT}] * SAMPLES
        outputs = llm.generate(prompts, params, use_tqdm=False)
        counted = counters(llm)
    seen = np.zeros(VOCAB**LENGTH)
    for output in outputs:
        index = 0
        for token in output.outputs[0].token_ids:
            index = index * VOCAB + token
        seen[index] += 1
    return seen, counted


def pearson(seen: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """Return Pearson's statistic and its FALSE_ALARM quantile; cells that expect fewer than 10 are pooled."""
    expected = probabilities * seen.sum()
    rare = expected < 10
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    statistic = float(((seen - expected) ** 2 / expected).sum())
    return statistic, float(chi2.isf(FALSE_ALARM, df=len(expected) - 1))


def test_sampled_outputs_follow_the_full_model(model: Path):
    seen, counted = sample(model)
    rate = counted["accepted_tokens"] / counted["draft_tokens"]
    assert 0.1 < rate < 0.9, f"acceptance rate {rate:.2f}: the test would not see a wrong acceptance rule"
    statistic, limit = pearson(seen, exact_distribution(model))
    assert statistic < limit


@pytest.mark.skipif(ON_V2, reason="there vLLM's own rejection sampler verifies")
def test_the_test_notices_unconditional_acceptance(model: Path, monkeypatch: pytest.MonkeyPatch):
    from vllm.v1.outputs import SamplerOutput

    from vllm_earlyexit.engine import verification

    def accept_everything(sampler, metadata, logits, sampling, outputs, final=None):
        bonus = sampler(logits=logits[metadata.bonus_logits_indices], sampling_metadata=sampling).sampled_token_ids
        chosen = torch.full((len(bonus), metadata.max_spec_len + 1), -1, dtype=torch.int32)
        for row, drafts in enumerate(metadata.draft_token_ids.split(metadata.num_draft_tokens)):
            chosen[row, : len(drafts)] = drafts
            chosen[row, len(drafts)] = bonus[row, 0]
        return SamplerOutput(chosen, None)

    monkeypatch.setattr(verification, "sample_in_turn", accept_everything)
    seen, counted = sample(model)
    assert counted["accepted_tokens"] == counted["draft_tokens"]
    statistic, limit = pearson(seen, exact_distribution(model))
    assert statistic > 10 * limit
