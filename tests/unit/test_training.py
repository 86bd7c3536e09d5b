import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vllm_earlyexit.training.calibrate import Trace, replay, thresholds
from vllm_earlyexit.training.data import Window, batches, pad, split, tokenize
from vllm_earlyexit.training.records import read_records
from vllm_earlyexit.training.train import distillation_loss, draft_target, frequent_tokens


class Characters:
    """A tokenizer of one token a character, with a chat template of its own."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool, **_: object) -> list[int]:
        text = "".join(f"<{m['role'][0]}>{m['content']}</>" for m in messages)
        return [ord(c) for c in text + ("<a>" if add_generation_prompt else "")]


def test_conversations_score_what_predicts_an_answer():
    window = tokenize({"id": 1, "turns": ["hi", "yes"]}, Characters())
    text = "".join(map(chr, window.ids))
    assert text == "<u>hi</><a>yes</>"
    predicted = "".join(c for c, scored in zip(text[1:], window.scored, strict=False) if scored)
    assert predicted == "yes</>"


def test_texts_score_every_token():
    assert tokenize({"id": 1, "text": "abc"}, Characters()) == Window([97, 98, 99], [True] * 3)


@pytest.mark.parametrize("line", ["{", "[]", '{"id": 1}', '{"text": "x"}'])
def test_a_bad_record_is_named_with_its_line(tmp_path: Path, line: str):
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": 1, "text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2"):
        list(read_records(path))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 100))
def test_batches_hold_every_window_once_within_the_limit(lengths: list[int], limit: int):
    items = [Window([n] * length, [True] * length) for n, length in enumerate(lengths)]
    grouped = list(batches(items, limit, seed=0))
    assert sorted(w.ids[0] for group in grouped for w in group) == list(range(len(items)))
    assert all(pad(group, 0)[0].numel() <= limit for group in grouped)


def test_split_is_disjoint_and_repeatable():
    items = [Window([n], [True]) for n in range(50)]
    train, held_out = split(items, 0.1, seed=3)
    assert len(held_out) == 5
    assert sorted(w.ids[0] for w in train + held_out) == list(range(50))
    assert split(items, 0.1, seed=3) == (train, held_out)


def test_the_draft_vocabulary_is_the_most_frequent_scored_tokens():
    window = Window([5, 5, 5, 9, 9, 2, 7, 7, 7, 7], [True] * 6 + [False] * 4)
    chosen = frequent_tokens([window], 2, vocab_size=12)
    assert chosen is not None
    assert chosen.tolist() == [5, 9]
    filled = frequent_tokens([window], 5, vocab_size=12)
    assert filled is not None
    assert filled.tolist() == [0, 1, 2, 5, 9]
    assert frequent_tokens([window], 12, vocab_size=12) is None
    assert frequent_tokens([window], 0, vocab_size=12) is None


def test_the_loss_is_the_divergence_on_the_draft_vocabulary():
    torch.manual_seed(0)
    teacher, vocab = torch.randn(6, 10), torch.tensor([1, 4, 7])
    student = torch.randn(6, 3)
    p = teacher.softmax(-1)[:, vocab]
    mass = p.sum(-1)
    log_q = student.log_softmax(-1)
    divergence = F.kl_div(log_q, p / mass.unsqueeze(-1), reduction="none").sum(-1)
    loss = distillation_loss(student, draft_target(teacher, vocab))
    assert math.isclose(loss.item(), (divergence * mass).mean().item(), rel_tol=1e-5)
    same = distillation_loss(teacher, draft_target(teacher, None))
    assert abs(same.item()) < 1e-6


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_thresholds_keep_their_promise_and_are_the_largest_that_do(data: st.DataObject):
    n = data.draw(st.integers(1, 60))
    hundredths = data.draw(st.lists(st.integers(0, 500), min_size=n, max_size=n, unique=True))
    entropy = torch.tensor(hundredths) / 100  # the stored threshold is rounded to five digits
    agrees = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    for threshold in thresholds(Trace(entropy, agrees, [n]), (0.5, 0.8)):
        kept = entropy <= threshold.entropy + 1e-5
        assert agrees[kept].double().mean() >= threshold.accuracy - 1e-9
        assert math.isclose(threshold.coverage, float(kept.double().mean()), abs_tol=1e-4)
        for larger in entropy[entropy > threshold.entropy + 1e-5].tolist():
            assert agrees[entropy <= larger].double().mean() < threshold.accuracy


def test_replay_of_a_known_stretch():
    #                 sure and right, sure and wrong, unsure, sure and right
    trace = Trace(torch.tensor([0.1, 0.1, 9.0, 0.1]), torch.tensor([True, False, True, True]), [4])
    # Drafts tokens 0 and 1, stops at 2: one accepted, then the verified token; then unsure; then one at the end.
    done = replay(trace, threshold=1.0, longest=3)
    assert (done.verifications, done.draft_steps) == (3, 3 + 1 + 2)
    assert done.tokens == 2 + 1 + 2


def test_replay_without_sure_tokens_is_plain_decoding():
    done = replay(Trace(torch.full((5,), 9.0), torch.ones(5, dtype=torch.bool), [2, 3]), 1.0, 4)
    assert (done.tokens, done.verifications, done.draft_steps) == (5, 5, 5)
