import math
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.modules import GatedMLP
from vllm_earlyexit.training.attention import attend, packed_bias
from vllm_earlyexit.training.calibrate import AcceptanceMap, expected_calibration_error, replay, thresholds
from vllm_earlyexit.training.classroom import draft_index, frequent_tokens
from vllm_earlyexit.training.data import Window, cut, grouped, tokenize
from vllm_earlyexit.training.losses import LOSSES, LogProbabilities, Target, ce, feature_distance, kl, tv
from vllm_earlyexit.training.narrow import narrow, width_of
from vllm_earlyexit.training.records import read_records
from vllm_earlyexit.training.signals import compare, risk_coverage_area
from vllm_earlyexit.training.targets import top_targets
from vllm_earlyexit.training.teacher import compute_dtype
from vllm_earlyexit.training.traces import Trace


class Characters:
    """A tokenizer of one token a character, with a chat template of its own."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool, **_: object) -> list[int]:
        text = "".join(f"<{m['role'][0]}>{m['content']}</>" for m in messages)
        return [ord(c) for c in text + ("<a>" if add_generation_prompt else "")]


def predicted(window: Window) -> str:
    return "".join(chr(c) for c, scored in zip(window.ids[1:], window.scored, strict=False) if scored)


def test_conversations_score_what_predicts_an_answer():
    window = tokenize({"id": 1, "turns": ["hi", "yes"]}, Characters())
    assert "".join(map(chr, window.ids)) == "<u>hi</><a>yes</>"
    assert predicted(window) == "yes</>"


def test_own_answers_are_scored_token_by_token():
    ids = [ord(c) for c in "<u>hi</><a>yes"]
    window = tokenize({"id": 1, "ids": ids, "answer_start": 11}, Characters())
    assert window.ids == ids[:-1]  # nobody knows what follows the last one, and the model was never fed it
    assert "".join(chr(ids[n + 1]) for n, scored in enumerate(window.scored) if scored) == "yes"


def test_texts_score_every_token():
    assert tokenize({"id": 1, "text": "abc"}, Characters()) == Window([97, 98, 99], [True] * 3, "1")


@pytest.mark.parametrize("line", ["{", "[]", '{"id": 1}', '{"text": "x"}'])
def test_a_bad_record_is_named_with_its_line(tmp_path: Path, line: str):
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": 1, "text": "fine"}\n' + line + "\n")
    with pytest.raises(EarlyExitError, match=r"data\.jsonl, line 2"):
        list(read_records(path))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(8, 60), min_size=1, max_size=40), st.integers(8, 30), st.integers(30, 100))
def test_windows_hold_every_token_once_within_the_limits(lengths: list[int], longest: int, limit: int):
    wholes = [Window(list(range(n)), [True] * n, str(k)) for k, n in enumerate(lengths)]
    parts = [part for whole in wholes for part in cut(whole, longest)]
    assert all(len(part.ids) <= longest for part in parts)
    for whole in wholes:
        kept = [token for part in parts if part.document == whole.document for token in part.ids]
        assert kept == whole.ids[: len(kept)]
        assert len(whole.ids) - len(kept) < 8  # a rest too short to be worth a pass
    groups = list(grouped(parts, limit))
    assert [part for group in groups for part in group] == parts
    assert all(len(group) == 1 or sum(len(part.ids) for part in group) <= limit for group in groups)


def test_the_draft_vocabulary_is_what_the_model_chooses_most():
    chosen = [torch.tensor([5, 5, 5, 9]), torch.tensor([9, 2])]
    assert frequent_tokens(iter(chosen), 2, vocab_size=12).tolist() == [5, 9]  # type: ignore[union-attr]
    assert frequent_tokens(iter(chosen), 5, vocab_size=12).tolist() == [0, 1, 2, 5, 9]  # type: ignore[union-attr]
    assert frequent_tokens(iter(chosen), 12, vocab_size=12) is None
    assert frequent_tokens(iter(chosen), 0, vocab_size=12) is None
    own = torch.tensor([2, 3, 9])
    assert frequent_tokens(iter(chosen), 1, vocab_size=12, known=own).tolist() == [5]  # type: ignore[union-attr]
    assert frequent_tokens(iter(chosen), 4, vocab_size=12, known=own).tolist() == [2, 3, 5, 9]  # type: ignore[union-attr]
    assert draft_index(torch.tensor([2, 5]), 6).tolist() == [-1, -1, 0, -1, -1, 1]


@pytest.mark.parametrize(("vocab", "k"), [(1000, 5), (64, 3), (130, 40), (4096, 32)])
def test_top_targets_are_the_models_largest_probabilities(vocab: int, k: int):
    torch.manual_seed(0)
    final, weight = torch.randn(600, 16), torch.randn(vocab, 16)
    ids, p = top_targets(final, lambda rows: rows @ weight.T, vocab, k)
    expected = (final @ weight.T).softmax(-1).topk(k)
    assert torch.equal(ids.long(), expected.indices)
    torch.testing.assert_close(p.float(), expected.values, atol=1e-3, rtol=1e-3)


def test_feature_distance_is_relative_to_the_full_models_features():
    final = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert feature_distance(final, final).item() == 0
    off = final + torch.tensor([[0.0, 5.0], [1.0, 0.0]])
    assert math.isclose(feature_distance(off, final).item(), (25 / 25 + 1 / 4) / 2)


def test_a_narrower_mlp_does_what_is_left_of_the_others():
    """Units that are never active go, and of those that always do the same as others, these take over the work."""
    torch.manual_seed(0)
    mlp = GatedMLP(16, 12)
    for parameter in mlp.parameters():
        parameter.data.normal_()
    gate, up = mlp.gate_up.weight.data.chunk(2)
    gate[4:8], up[4:8], up[8:] = gate[:4], 2 * up[:4], 0
    x = torch.randn(200, 16)
    with torch.no_grad():
        before = mlp(x)
        active = F.silu(mlp.norm(x) @ gate.T) * (mlp.norm(x) @ up.T)
        narrow(mlp, active.T @ active, 4)
        after = mlp(x)
    assert width_of(mlp) == 4
    assert mlp.gate_up.weight.shape == (8, 16)
    assert (after - before).norm() < 0.01 * (before - x).norm()


def everything(teacher: torch.Tensor, vocab: torch.Tensor) -> Target:
    """A target that keeps all of the teacher's probabilities, for drafting from ``vocab``."""
    p, ids = teacher.softmax(-1).sort(dim=-1, descending=True)
    return Target(ids, p, draft_index(vocab, teacher.shape[1]))


def test_with_all_probabilities_kept_the_losses_are_their_formulas():
    torch.manual_seed(0)
    teacher, vocab, student = torch.randn(6, 10), torch.tensor([1, 4, 7]), torch.randn(6, 3)
    p = teacher.softmax(-1)[:, vocab]
    mass = p.sum(-1)
    p, q = p / mass.unsqueeze(-1), student.softmax(-1)
    target = everything(teacher, vocab)
    divergence = F.kl_div(q.log(), p, reduction="none").sum(-1)
    assert math.isclose(kl(student, target).item(), (divergence * mass).mean().item(), rel_tol=1e-4)
    distance = (p - q).abs().sum(-1) / 2
    assert math.isclose(tv(student, target).item(), (distance * mass).mean().item(), rel_tol=1e-4)
    first = draft_index(vocab, 10)[teacher.argmax(-1)]
    sayable = first >= 0
    expected = F.cross_entropy(student[sayable], first[sayable], reduction="sum") / 6
    assert math.isclose(ce(student, target).item(), expected.item(), rel_tol=1e-4)


def test_log_probabilities_and_their_gradient_are_those_of_log_softmax():
    torch.manual_seed(0)
    logits, index = torch.randn(37, 50, requires_grad=True), torch.randint(50, (37, 4))
    weight = torch.randn(37, 4)
    found = LogProbabilities.apply(logits, index)
    expected = logits.log_softmax(-1).gather(1, index)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad((value * weight).sum(), logits)[0] for value in (found, expected))
    torch.testing.assert_close(ours, theirs)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_dropping_the_tail_of_the_target_never_adds_divergence(k: int, seed: int):
    """Merging outcomes can only lose information, for KL as for total variation (data processing inequality)."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (2 * torch.randn(4, 10, generator=generator) for _ in range(2))
    p, ids = teacher.softmax(-1).sort(dim=-1, descending=True)
    for name in ("kl", "tv"):
        whole, merged = (
            LOSSES[name](student, Target(ids[:, :n], p[:, :n], torch.arange(10)))  # type: ignore[index]
            for n in (10, k)
        )
        assert -1e-5 <= merged <= whole + 1e-5
    assert kl(teacher, Target(ids[:, :k], p[:, :k], torch.arange(10))).abs() < 1e-5


def test_attention_sees_exact_keys_before_and_provisional_ones_from_their_own_step():
    torch.manual_seed(0)
    lengths, pending, heads, size = [5, 7], 2, 4, 8
    total = sum(lengths)
    query = torch.randn(total, heads, size)
    exact, *drafted = [(torch.randn(total, 2, size), torch.randn(total, 2, size)) for _ in range(pending + 2)]
    out = attend(query, exact, drafted, lengths)
    for start, length in ((0, 5), (5, 7)):
        for t in range(length):
            # Token t - j was drafted j steps ago; older tokens are verified.
            pairs = [drafted[pending - j] if (j := t - s) <= pending else exact for s in range(t + 1)]
            keys = torch.stack([k[start + s] for s, (k, _) in enumerate(pairs)]).repeat_interleave(2, dim=1)
            values = torch.stack([v[start + s] for s, (_, v) in enumerate(pairs)]).repeat_interleave(2, dim=1)
            weights = (torch.einsum("hd,shd->hs", query[start + t], keys) / math.sqrt(size)).softmax(-1)
            expected = torch.einsum("hs,shd->hd", weights, values)
            torch.testing.assert_close(out[start + t], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pending", [0, 1, 3])
def test_xformers_block_diagonal_bias_gives_the_same_attention(pending: int):
    """On CUDA a pack is attended in one call with this bias; its kernel does not run on a CPU, its bias does."""
    torch.manual_seed(0)
    lengths, size = [3, 9, 1, 6], 8
    total = sum(lengths)
    query = torch.randn(total, 2, size)
    exact, *drafted = [(torch.randn(total, 2, size), torch.randn(total, 2, size)) for _ in range(pending + 2)]
    bias = packed_bias(lengths, pending, torch.float32, query.device)
    keys, values = (torch.cat([pair[n] for pair in [exact, *drafted]]) for n in range(2))
    whole = F.scaled_dot_product_attention(
        *(tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, keys, values)), attn_mask=bias
    )[0].transpose(0, 1)
    torch.testing.assert_close(whole, attend(query, exact, drafted, lengths), atol=1e-5, rtol=1e-5)


def test_without_deep_keys_only_drafted_ones_are_seen():
    torch.manual_seed(0)
    query, *drafted = torch.randn(3, 5, 2, 8)
    pair = (drafted[0], drafted[1])
    with_others = [attend(query, (torch.randn(5, 2, 8), torch.randn(5, 2, 8)), [pair], [5], False) for _ in range(2)]
    assert torch.equal(*with_others)
    torch.testing.assert_close(with_others[0], drafted[1])  # a token sees itself alone


def trace_of(entropy: torch.Tensor, agrees: torch.Tensor, lengths: list[int]) -> Trace:
    top = torch.stack([torch.exp(-entropy), 0.5 * torch.exp(-entropy)], dim=1)
    return Trace(entropy, agrees, lengths, top, torch.randn(len(entropy), 3).half(), list(range(len(lengths))))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_thresholds_keep_their_promise_and_are_the_largest_that_do(data: st.DataObject):
    n = data.draw(st.integers(1, 60))
    hundredths = data.draw(st.lists(st.integers(0, 500), min_size=n, max_size=n, unique=True))
    entropy = torch.tensor(hundredths) / 100  # the stored threshold is rounded to five digits
    agrees = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    for threshold in thresholds(trace_of(entropy, agrees, [n]), (0.5, 0.8)):
        kept = entropy <= threshold.entropy + 1e-5
        assert agrees[kept].double().mean() >= threshold.accuracy - 1e-9
        assert math.isclose(threshold.coverage, float(kept.double().mean()), abs_tol=1e-4)
        for larger in entropy[entropy > threshold.entropy + 1e-5].tolist():
            assert agrees[entropy <= larger].double().mean() < threshold.accuracy


def test_a_threshold_is_measured_on_documents_it_was_not_fitted_on():
    # Documents 0 and 2 agree below one nat, 1 and 3 never: fitted on one half, a threshold fails on the other.
    entropy = torch.tensor([0.5, 2.0] * 4)
    agrees = torch.tensor([True, False, False, False] * 2)
    (threshold,) = thresholds(trace_of(entropy, agrees, [2, 2, 2, 2]), (0.5,))
    assert threshold.entropy == 0.5
    assert threshold.measured == 0.0


def test_replay_of_a_known_stretch():
    #                 sure and right, sure and wrong, unsure, sure and right
    trace = trace_of(torch.tensor([0.1, 0.1, 9.0, 0.1]), torch.tensor([True, False, True, True]), [4])
    # Drafts tokens 0 and 1, stops at 2: one accepted, then the verified token; then unsure; then one at the end.
    done = replay([trace], threshold=1.0, longest=3)
    assert (done.verifications, done.draft_steps) == (3, 3 + 1 + 2)
    assert done.tokens == 2 + 1 + 2


def test_replay_looks_at_each_draft_position_where_it_is():
    sure = torch.zeros(4)
    right, wrong = (trace_of(sure, torch.full((4,), agrees), [4]) for agrees in (True, False))
    assert replay([right, wrong], 1.0, 3).verifications == 2  # the second draft token is always rejected
    assert replay([right], 1.0, 3).verifications == 1


def test_replay_without_sure_tokens_is_plain_decoding():
    done = replay([trace_of(torch.full((5,), 9.0), torch.ones(5, dtype=torch.bool), [2, 3])], 1.0, 4)
    assert (done.tokens, done.verifications, done.draft_steps) == (5, 5, 5)


def simulated(n: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Entropies, and agreement with a probability that falls with them."""
    draw = np.random.default_rng(0)
    entropy = draw.uniform(0, 5, n)
    return entropy, draw.uniform(size=n) < np.exp(-entropy)


def test_the_acceptance_map_falls_and_is_calibrated():
    entropy, agrees = simulated()
    fitted = AcceptanceMap.fit(entropy[::2], agrees[::2])
    assert (np.diff(fitted.probability) <= 0).all()
    probability = fitted(entropy[1::2])
    assert np.abs(probability - np.exp(-entropy[1::2])).mean() < 0.02
    assert expected_calibration_error(probability, agrees[1::2]) < 0.02
    assert expected_calibration_error(np.full(10_000, 0.9), agrees[1::2]) > 0.5


def test_signals_are_ranked_and_useless_ones_are_told_apart():
    entropy, agrees = simulated(4000)
    trace = trace_of(torch.from_numpy(entropy).float(), torch.from_numpy(agrees), [40] * 100)
    found = {signal.name: signal for signal in compare(trace, np.arange(4000) % 80 < 40)}
    assert found["entropy"].low <= found["entropy"].risk_coverage_area <= found["entropy"].high
    assert found["entropy"].risk_coverage_area == pytest.approx(found["margin"].risk_coverage_area, abs=1e-3)
    assert found["probe"].risk_coverage_area == pytest.approx(found["entropy"].risk_coverage_area, abs=0.03)
    noise = np.random.default_rng(1).uniform(size=4000)
    assert risk_coverage_area(noise, agrees) > found["entropy"].high


def test_risk_coverage_area_of_a_known_case():
    # Errors among the surest 1, 2, 3, 4 tokens: 0, 0, 1/3, 2/4.
    assert risk_coverage_area(np.array([4, 3, 2, 1]), np.array([True, True, False, False])) == pytest.approx(5 / 24)


@pytest.mark.parametrize(
    ("machine", "onednn", "avx512_bf16", "amx", "expected"),
    [
        ("x86_64", False, False, False, torch.float32),
        ("x86_64", True, False, False, torch.float32),
        ("x86_64", True, True, False, torch.bfloat16),
        ("x86_64", True, False, True, torch.bfloat16),
        ("aarch64", True, False, False, torch.bfloat16),
    ],
)
def test_cpus_without_bfloat16_compute_in_float32(
    monkeypatch: pytest.MonkeyPatch, machine: str, onednn: bool, avx512_bf16: bool, amx: bool, expected: torch.dtype
):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert compute_dtype("cpu") == expected
    assert compute_dtype("cuda") == torch.bfloat16
