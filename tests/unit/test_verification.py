from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_earlyexit.engine import verification

VOCAB = 7


@dataclass
class Sampling:
    all_greedy: bool = True
    all_random: bool = False
    max_num_logprobs: int | None = None
    logprob_token_ids: dict[int, list[int]] | None = None
    no_penalties: bool = True
    bad_words_token_ids: dict[int, list[list[int]]] = field(default_factory=dict)
    allowed_token_ids_mask: torch.Tensor | None = None
    thinking_budget_state_holder: Any = None
    logitsprocs: Any = field(default_factory=lambda: SimpleNamespace(non_argmax_invariant=[]))


def metadata_of(drafts: list[list[int]]) -> SpecDecodeMetadata:
    """Return vLLM's metadata of a batch, as its runner makes it."""
    made = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    at, targets, bonus = 0, [], []
    for draft in drafts:
        targets += range(at, at + len(draft))
        at += len(draft) + 1
        bonus.append(at - 1)
    return replace(made, target_logits_indices=torch.tensor(targets), bonus_logits_indices=torch.tensor(bonus))


@given(
    st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=5), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_drafts_are_accepted_while_they_are_what_argmax_says(drafts, dtype, random):  # type: ignore[no-untyped-def]
    metadata = metadata_of(drafts)
    rows = sum(len(draft) + 1 for draft in drafts)
    logits = torch.tensor([[random.choice([-1.0, 0.5, 2.0]) for _ in range(VOCAB)] for _ in range(rows)])  # many ties
    for row, token in zip(metadata.target_logits_indices.tolist(), metadata.draft_token_ids.tolist(), strict=True):
        if random.random() < 0.7:
            logits[row, token] = 3.0
    logits = logits.to(dtype)
    best = iter(logits.to(torch.float32).argmax(dim=-1).tolist())
    expected = []
    for draft in drafts:
        own = [next(best) for _ in range(len(draft) + 1)]
        accepted = next((n for n, token in enumerate(draft) if token != own[n]), len(draft))
        expected.append(own[: accepted + 1] + [-1] * (metadata.max_spec_len - accepted))
    assert verification.take_largest(metadata, logits).sampled_token_ids.tolist() == expected


@pytest.mark.parametrize("vocab", [50_000, 49_152, 151_936])
def test_of_equal_logits_the_first_counts_in_a_large_vocabulary(vocab: int):
    logits = torch.zeros(4, vocab, dtype=torch.bfloat16)
    for row, (first, second) in enumerate([(17, 40_000), (31, 32), (0, vocab - 1), (12_345, 12_361)]):
        logits[row, [first, second]] = 1.0
    found = verification.take_largest(metadata_of([[17, 31], [1]]), logits[[0, 1, 2, 3, 0]]).sampled_token_ids
    assert found.tolist() == [[17, 31, 0], [12_345, -1, -1]]
    assert logits.to(torch.float32).argmax(dim=-1).tolist() == [17, 31, 0, 12_345]


def processor(kind: type, **state: Any) -> Any:
    made = kind.__new__(kind)
    vars(made).update(state)
    return SimpleNamespace(non_argmax_invariant=[made])


def test_idle_processors_change_nothing():
    assert verification.only_largest(Sampling())  # type: ignore[arg-type]
    for harmless in (
        processor(MinTokensLogitsProcessor, min_toks={}),
        processor(LogitBiasLogitsProcessor, biases={}),
    ):
        assert verification.only_largest(Sampling(logitsprocs=harmless))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wish",
    [
        {"all_greedy": False},
        {"max_num_logprobs": 0},
        {"logprob_token_ids": {0: [3]}},
        {"no_penalties": False},
        {"bad_words_token_ids": {0: [[1]]}},
        {"allowed_token_ids_mask": torch.zeros(1, VOCAB, dtype=torch.bool)},
        {"thinking_budget_state_holder": SimpleNamespace(has_tracked_requests=lambda: True)},
        {"logitsprocs": processor(MinTokensLogitsProcessor, min_toks={0: (3, [], set(), False)})},
        {"logitsprocs": processor(LogitBiasLogitsProcessor, biases={0: {3: 1.0}})},
        {"logitsprocs": processor(SimpleNamespace)},
    ],
    ids=lambda wish: "-".join(wish),
)
def test_each_other_wish_goes_to_vllm(wish):  # type: ignore[no-untyped-def]
    assert not verification.only_largest(Sampling(**wish))  # type: ignore[arg-type]
