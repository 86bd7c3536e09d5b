"""Two ranks, each with half of the model, draft what one rank drafts, and answer what plain vLLM answers."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.engine.conftest import counters
from tests.engine.tiny import tiny_model
from vllm_earlyexit.engine import seams
from vllm_earlyexit.heads.checkpoint import (
    Calibration,
    ExitHeadConfig,
    Heads,
    HeadsConfig,
    PositionCalibration,
    Threshold,
)
from vllm_earlyexit.heads.fingerprint import fingerprint
from vllm_earlyexit.heads.modules import build_head

HIDDEN, VOCAB, DRAFTED = 64, 64, 48


def recurrent_heads(folder: Path, model: Path, shared: bool = False) -> Path:
    """Write a head that is near the shared one and attends to the last layer; it drafts three tokens of four.

    If it is to be ``shared``, it says what the shared head says.
    """
    torch.manual_seed(0)
    head = build_head("recurrent", HIDDEN, 64, HIDDEN)
    for parameter in head.parameters():
        parameter.data += 0.0 if shared else 0.1 * torch.randn_like(parameter)
    if shared:
        torch.nn.init.zeros_(head.get_parameter("recurrence.weight"))
    position = PositionCalibration(
        agreement=0.5, entropy=(0.1, 3.0), probability=(0.9, 0.3), expected_calibration_error=0.0
    )
    calibration = Calibration(
        tokens=1,
        agreement=0.5,
        thresholds=(Threshold(accuracy=0.7, entropy=2.0, coverage=0.5),),
        positions=(position,),
    )
    exit_config = ExitHeadConfig(
        exit_layer=2, kind="recurrent", intermediate_size=64, query_size=HIDDEN, calibration=calibration
    )
    config = HeadsConfig(
        base_model=model.name,
        fingerprint=fingerprint(model),
        hidden_size=HIDDEN,
        num_layers=4,
        vocab_size=VOCAB,
        draft_vocab_size=VOCAB if shared else DRAFTED,
        exits=(exit_config,),
    )
    drafted = None if shared else torch.randperm(VOCAB)[:DRAFTED].sort().values
    Heads(config, {2: head}, drafted).save(folder, storage="float32")
    return folder


def answers(model: Path, ranks: int, setting: dict[str, Any] | None) -> tuple[list[list[int]], dict[str, int]]:
    """Answer prompts of tokens, in processes of their own."""
    made = torch.Generator().manual_seed(1)
    prompts: list[Any] = [
        {"prompt_token_ids": torch.randint(0, VOCAB, (n,), generator=made).tolist()} for n in (3, 17, 40, 70)
    ]
    params = [SamplingParams(temperature=t, seed=3, max_tokens=40, ignore_eos=True, detokenize=False) for t in (0, 1)]
    llm = LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        seed=0,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp",
        speculative_config=setting,
    )
    try:
        outputs = [output for one in params for output in llm.generate(prompts, one, use_tqdm=False)]
        return [list(output.outputs[0].token_ids) for output in outputs], counters(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        seams.remove("engine")


def check_two_ranks(model: Path, setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Assert that two ranks draft as one and answer as two plain ones, and return these answers; leave it at two."""
    cores = sorted(os.sched_getaffinity(0))
    fixed = setting | {"policy": "fixed", "num_speculative_tokens": 3}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(cores[0]))
    alone, counted_alone = answers(model, 1, fixed)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    plain, _ = answers(model, 2, None)
    found, counted = answers(model, 2, fixed)
    assert found == plain == alone
    assert counted == counted_alone
    assert counted["draft_tokens"] > counted["accepted_tokens"] > 20
    return plain


def test_two_ranks_draft_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(tmp_path / "model")
    setting = {"method": "self_exit", "model": str(recurrent_heads(tmp_path / "heads", model))}
    plain = check_two_ranks(model, setting, monkeypatch)
    assert answers(model, 2, setting | {"policy": "auto"})[0] == plain, "each rank has times of its own"
