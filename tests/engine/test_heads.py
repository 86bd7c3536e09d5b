"""The engine computes with an exit head what training computed: same logits at every draft position."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import engine, runner_of
from tests.engine.heads import random_heads
from tests.engine.tiny import tiny_model
from vllm_earlyexit.engine.head import Asked, TrainedExit, as_vllm
from vllm_earlyexit.heads.checkpoint import load_heads
from vllm_earlyexit.heads.modules import HeadKind
from vllm_earlyexit.training.data import Window
from vllm_earlyexit.training.teacher import Teacher, draft_steps

EXIT_LAYER = 2
PROMPT = [3, 17, 5, 40, 22, 9, 31, 8]


def drafted_logits(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[list[int], int, torch.Tensor]]:
    """Return, for every draft step of a run, the tokens so far, how many were pending before, and the logits."""
    from vllm import SamplingParams

    seen: list[tuple[list[int], int, torch.Tensor]] = []
    setting = {"method": "self_exit", "model": str(heads), "num_speculative_tokens": 3}
    with engine(model, skip_tokenizer_init=True, speculative_config=setting) as llm:
        runner = runner_of(llm)
        propose = runner.drafter.propose
        inner = TrainedExit.logits
        sequence: list[int] = []
        verified = 0

        def watch_round(*arguments: Any) -> list[list[int]]:
            nonlocal sequence, verified
            verified = int(runner.input_batch.num_tokens_no_spec[0])
            sequence = runner.input_batch.token_ids_cpu[0, :verified].tolist()
            return propose(*arguments)

        def watch_step(head: TrainedExit, features: torch.Tensor) -> torch.Tensor:
            logits = inner(head, features)
            seen.append((list(sequence), len(sequence) - verified, logits[0].clone()))
            sequence.append(int(logits[0].argmax()))
            return logits

        runner.drafter.propose = watch_round
        monkeypatch.setattr(TrainedExit, "logits", watch_step)
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        prompts: list[Any] = [{"prompt_token_ids": PROMPT}]
        llm.generate(prompts, params, use_tqdm=False)
    return seen


@pytest.mark.parametrize(
    ("architecture", "kind"), [("llama", "recurrent"), ("qwen2", "recurrent"), ("llama", "tail"), ("llama", "mlp")]
)
@torch.no_grad()
def test_drafting_computes_what_training_computed(
    tmp_path: Path, architecture: str, kind: HeadKind, monkeypatch: pytest.MonkeyPatch
):
    model = tiny_model(tmp_path / "model", architecture)
    heads = random_heads(tmp_path / "heads", model, kind, EXIT_LAYER, std=0.15)
    teacher, module = Teacher(model, "cpu", torch.float32), load_heads(heads).modules[EXIT_LAYER]
    steps = drafted_logits(model, heads, monkeypatch)
    assert {pending for _, pending, _ in steps} == {0, 1, 2}
    for tokens, pending, logits in steps:
        batch = teacher.observe([Window(tokens, [True] * len(tokens))], (EXIT_LAYER,), top_k=1)
        features = draft_steps(teacher, module, batch.hidden[EXIT_LAYER], batch, pending)[-1]
        expected = teacher.unembed(features)[-1]
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
        assert expected.std() > 0.3


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
@torch.no_grad()
def test_a_compiled_head_says_what_the_same_head_says_eagerly(tmp_path: Path, dtype: str, tolerance: float):
    """In bfloat16, where a CPU can, its maps are int8; there near ties may be chosen otherwise."""
    from vllm import SamplingParams

    model = tiny_model(tmp_path / "model")
    heads = random_heads(tmp_path / "heads", model, "recurrent", EXIT_LAYER, std=0.15)
    setting = {"method": "self_exit", "model": str(heads), "policy": "fixed", "num_speculative_tokens": 3}
    differences = []
    arguments: dict[str, Any] = {"skip_tokenizer_init": True, "enforce_eager": False, "dtype": dtype}
    with engine(model, speculative_config=setting, **arguments) as llm:
        (drafted_from,) = runner_of(llm).drafter.drafter.exits
        compiled = drafted_from.head

        def compare(*inputs: torch.Tensor) -> Asked:
            said, eagerly = compiled(*inputs), Asked(*compiled.exit.forward(*inputs))
            pairs = [(said.features, eagerly.features), (said.entropy, eagerly.entropy)]
            if dtype == "float32":
                pairs.append((said.token_ids, eagerly.token_ids))
            assert said.features.float().abs().max() > 1
            differences.append(max(float((a.float() - b.float()).abs().max()) for a, b in pairs))
            return said

        drafted_from.head = compare
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        prompts: list[Any] = [{"prompt_token_ids": PROMPT[: n + 2]} for n in range(3)]
        llm.generate(prompts, params, use_tqdm=False)
        assert not compiled.exit.do_not_compile
    assert len(differences) >= 3
    assert max(differences) < tolerance


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="bfloat16 heads compute in int8 only where this CPU can")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 5])
def test_an_int8_map_is_close_to_the_map(n: int, bias: bool):
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 200, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(n, 96, dtype=torch.bfloat16)
    expected, close = linear(x).float(), as_vllm(torch.nn.Sequential(linear))(x).float()
    assert close.shape == (n, 200)
    error = (close - expected).norm() / expected.norm()
    assert 0 < error < 0.02  # 1 part in 127 at most, of weights and of inputs
