"""On Model Runner V2, too, nothing is lost or computed twice whatever is scheduled."""

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine.conftest import counters, engine
from tests.engine.reference import Reference
from tests.engine.test_kv import Fed
from tests.engine.test_scheduling import NOISE, assert_nothing_is_left, cached_blocks, chat_ids, metric
from tests.v2.conftest import BATCH, FEW, FIXED, TOKENS, answer


def test_nothing_is_computed_twice(smollm2: Path, plain: Reference, monkeypatch: pytest.MonkeyPatch):
    prompts = plain.prompts[:FEW]
    with engine(smollm2, speculative_config=FIXED, enable_prefix_caching=False, max_num_batched_tokens=40) as llm:
        fed, params = Fed(monkeypatch), SamplingParams(temperature=0, max_tokens=TOKENS)
        outputs = llm.generate(chat_ids(llm, prompts), params, use_tqdm=False)
        plain.check([list(output.outputs[0].token_ids) for output in outputs], BATCH)
        counted = counters(llm)
    verified = sum(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) - 1 for o in outputs)
    rejected = counted["draft_tokens"] - counted["accepted_tokens"]
    assert len(fed.tokens) == 2
    for count in fed.tokens.values():  # tokens accepted past the end of an answer are verified and thrown away
        assert verified + rejected <= count <= verified + rejected + 3 * len(prompts)
    assert len(set(fed.tokens.values())) == 1


def test_cached_blocks_hold_what_plain_v2_puts_there(smollm2: Path, plain: Reference, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    expected = cached_blocks(smollm2, plain.prompts[:6])
    found = cached_blocks(smollm2, plain.prompts[:6], speculative_config=FIXED)
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for key, block in expected.items():
        assert (found[key] - block).abs().max() < NOISE


def test_preempted_requests_start_again(smollm2: Path, plain: Reference):
    tight: dict[str, Any] = {"max_model_len": 256, "block_size": 32, "num_gpu_blocks_override": 10}
    with engine(smollm2, speculative_config=FIXED, max_num_seqs=4, **tight) as llm:
        plain.check(answer(llm, plain.prompts, len(plain.prompts)), BATCH)
        assert metric(llm, "num_preemptions") > 2
        assert counters(llm)["accepted_tokens"] > 50
        assert_nothing_is_left(llm)


def test_aborts_at_every_phase(smollm2: Path, plain: Reference):
    """A victim beside every request, aborted after 0, 1, 2, … steps."""
    with engine(smollm2, speculative_config=FIXED, max_num_batched_tokens=48) as llm:
        asked, params = chat_ids(llm, plain.prompts), SamplingParams(temperature=0, max_tokens=TOKENS)
        found = []
        for number, prompt in enumerate(asked):
            llm.llm_engine.add_request(f"kept {number}", prompt, params)
            llm.llm_engine.add_request(f"victim {number}", asked[-1 - number], params)
            age = 0
            while llm.llm_engine.has_unfinished_requests():
                if age == number:
                    llm.llm_engine.abort_request([f"victim {number}"])
                age += 1
                for output in llm.llm_engine.step():
                    if output.finished and output.request_id.startswith("kept"):
                        found.append(list(output.outputs[0].token_ids))
        plain.check(found, BATCH)
        assert counters(llm)["accepted_tokens"] > 50
        llm.llm_engine.step()
        assert_nothing_is_left(llm)
