"""What holds on Model Runner V1 holds on V2; see tests/interpreter.py for how that runs here, and ``make test-v2``."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import adapter_of, counters, engine, runner_of
from tests.engine.reference import Reference
from tests.engine.test_early_exit import LOW, OPEN, PROPAGATING, counts, exits, responses
from tests.engine.test_lossless import draft_from_each_exit_in_turn
from tests.engine.test_patched import run
from tests.engine.test_scheduling import assert_nothing_is_left
from tests.patched import patched_copy
from tests.v2.conftest import BATCH, FEW, FIXED, TOKENS, answer
from vllm_earlyexit.engine import seams
from vllm_earlyexit.engine.early_exit import MODE
from vllm_earlyexit.engine.runner_v2 import SelfExitSpeculator

ROOT = Path(__file__).parents[2]
LORA = {"speculative_config": FIXED, "enable_lora": True, "max_lora_rank": 8}


@pytest.fixture
def on_v1(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """For tests that also want Model Runner V1: what to undo."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    return monkeypatch


def test_a_little_of_everything(smollm2: Path, prompts: list[str], on_v1: pytest.MonkeyPatch):
    """Short enough for every run of the tests: outputs are plain V2's, counts are those of the V1 adapter."""
    few = sorted(prompts, key=len)[:FEW]
    with engine(smollm2, speculative_config=FIXED) as llm:
        found_on_v1, counted_on_v1 = answer(llm, few, 4, max_tokens=16), counters(llm)
        assert not isinstance(adapter_of(llm), SelfExitSpeculator)
    on_v1.undo()
    with engine(smollm2) as llm:
        expected = answer(llm, few, 4, max_tokens=16)
    with engine(smollm2, speculative_config=FIXED, max_num_batched_tokens=32) as llm:
        assert isinstance(adapter_of(llm), SelfExitSpeculator)
        assert answer(llm, few, 4, max_tokens=16) == expected == found_on_v1
        assert counters(llm)["accepted_tokens"] == counted_on_v1["accepted_tokens"] > 0
        assert_nothing_is_left(llm)


@pytest.mark.parametrize("batch_size", [4, 1])
def test_greedy_outputs_are_plain_v2s_and_counts_are_v1s(
    smollm2: Path, plain: Reference, on_v1: pytest.MonkeyPatch, batch_size: int
):
    with engine(smollm2, speculative_config=FIXED) as llm:
        found_on_v1, counted_on_v1 = answer(llm, plain.prompts, batch_size), counters(llm)
    on_v1.undo()
    with engine(smollm2, speculative_config=FIXED) as llm:
        found = answer(llm, plain.prompts, batch_size)
        plain.check(found, BATCH)
        assert found == found_on_v1
        assert counters(llm) == counted_on_v1
        assert counted_on_v1["draft_tokens"] > counted_on_v1["accepted_tokens"] > 50


@pytest.mark.parametrize("policy", ["entropy", "auto"])
def test_other_policies(smollm2: Path, plain: Reference, ladder: str, policy: str):
    """From a ladder of exits; ``auto`` copies what repeats, too."""
    setting = {"method": "self_exit", "model": ladder, "policy": policy, "num_speculative_tokens": 4}
    with engine(smollm2, speculative_config=setting | {"exit_layer": (1, 4)}) as llm:
        if policy == "auto":
            draft_from_each_exit_in_turn(adapter_of(llm).drafter.policy)
        plain.check(answer(llm, plain.prompts, 4), BATCH)
        assert counters(llm)["draft_tokens"] > counters(llm)["accepted_tokens"] > 0


@pytest.mark.parametrize("policy", ["fixed", "auto"])
def test_looking_only_now_and_then(smollm2: Path, plain: Reference, ladder: str, policy: str):
    """As on GPUs, several draft steps are run before their tokens are looked at."""
    setting = {"method": "self_exit", "model": ladder, "policy": policy, "num_speculative_tokens": 4}
    with engine(smollm2, speculative_config=setting | {"exit_layer": 4 if policy == "fixed" else (1, 4)}) as llm:
        drafter = adapter_of(llm).drafter
        drafter.looks_ahead = True
        if policy == "auto":
            draft_from_each_exit_in_turn(drafter.policy)
        plain.check(answer(llm, plain.prompts[:FEW], 4), BATCH)
        assert counters(llm)["draft_tokens"] > counters(llm)["accepted_tokens"] > 0


def test_what_gpus_warm_up_with_leaves_nothing_behind(smollm2: Path, plain: Reference):
    """vLLM's GPU worker runs made-up batches with drafts that nobody made; the CPU's does not."""
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    with engine(smollm2, speculative_config=FIXED) as llm:
        runner = runner_of(llm)
        warmup_kernels(runner, runner.execute_model, runner.sample_tokens)
        plain.check(answer(llm, plain.prompts[:FEW], 4), BATCH)
        assert counters(llm)["accepted_tokens"] > 10
        assert_nothing_is_left(llm)


@pytest.mark.parametrize("setting", [OPEN, PROPAGATING], ids=["resume", "propagate"])
def test_early_exits_are_those_of_v1(
    smollm2: Path, plain: Reference, on_v1: pytest.MonkeyPatch, setting: dict[str, Any]
):
    """Beside requests that did not ask for them and decode as plain V2 does."""
    prompts, asked = plain.prompts[: FEW + 1], [None, LOW, {MODE: "off"}, LOW, LOW]
    with engine(smollm2, speculative_config=setting) as llm:
        on_v1_said, counted_on_v1 = responses(llm, prompts, asked, max_tokens=TOKENS), dict(counts(llm))
    on_v1.undo()
    with engine(smollm2, speculative_config=setting) as llm:
        said = responses(llm, prompts, asked, max_tokens=TOKENS)
        found = [list(output.outputs[0].token_ids) for output in said]
        assert found == [list(output.outputs[0].token_ids) for output in on_v1_said]
        assert exits(said) == exits(on_v1_said)
        assert [one is not None for one in exits(said)] == [False, True, False, True, True]
        assert dict(counts(llm)) == counted_on_v1
        assert counted_on_v1["early_tokens"] > 20
        plain.check([found[0], plain.answers[BATCH][1], found[2], *plain.answers[BATCH][3 : FEW + 1]], BATCH)


def test_lora_is_refused_and_left_to_v1(smollm2: Path, monkeypatch: pytest.MonkeyPatch):
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match="does not yet support: self-exit with LoRA adapters"), engine(smollm2, **LORA):
        pass
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    chosen = {}
    for lora in (False, True):
        args = EngineArgs(str(smollm2), speculative_config=FIXED, enable_lora=lora)
        chosen[lora] = args.create_engine_config().use_v2_model_runner
    seams.remove("engine")
    assert chosen == {False: True, True: False}


def test_a_patched_vllm_needs_no_seams(tmp_path: Path):
    """Engines of these tests assert that no seam is applied where vLLM is patched."""
    environment = os.environ | {"PYTHONPATH": f"{patched_copy(tmp_path)}{os.pathsep}{ROOT}"}
    chosen = ("-q", "-p", "no:cacheprovider", "tests/v2", "-k", "a_little_of_everything")
    run(environment, "-m", "pytest", *chosen)
