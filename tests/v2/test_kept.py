"""What verification on V2 keeps, beside a slow reference."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_earlyexit.engine.verification_v2 import kept

LONGEST = 4
SEQUENCE = st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 2)), max_size=LONGEST)
"""Of each draft token what was sampled before it, and the token, or -1."""


@given(st.lists(st.tuples(SEQUENCE, st.integers(0, 2)), min_size=1, max_size=5))
def test_tokens_are_kept_up_to_the_first_that_is_not_the_drafts(batch: list):
    tokens, fed, depth, expected = [], [], [], []
    for draft, last in batch:
        sampled = [*(token for token, _ in draft), last]
        tokens += sampled
        fed += [0, *(token for _, token in draft)]
        depth += range(len(sampled))
        right = [said == token for said, token in draft]
        expected.append(sampled[: [*right, False].index(False) + 1])
    whole, count = kept(torch.tensor(tokens), torch.tensor(fed), torch.tensor(depth), len(batch), LONGEST + 1)
    assert [row[:n] for row, n in zip(whole.tolist(), count.tolist(), strict=True)] == expected
