"""What verification on V2 keeps, beside a slow reference."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_earlyexit.engine.verification_v2 import kept

LONGEST = 4
SEQUENCE = st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 2), st.booleans()), max_size=LONGEST)
"""Of each draft token what was sampled before it, the token, or -1, and whether it has left."""


@given(st.lists(st.tuples(SEQUENCE, st.integers(0, 2)), min_size=1, max_size=5))
def test_tokens_are_kept_up_to_the_first_that_is_not_the_drafts(batch: list):
    tokens, fed, depth, left, expected = [], [], [], [], []
    for draft, last in batch:
        sampled = [*(said for said, *_ in draft), last]
        tokens += sampled
        fed += [0, *(token for _, token, _ in draft)]
        depth += range(len(sampled))
        left += [*(leaves for *_, leaves in draft), True]
        wanted = [token if leaves and token >= 0 else said for said, token, leaves in draft]
        right = [said == token for said, (_, token, _) in zip(wanted, draft, strict=True)]
        expected.append([*wanted, last][: [*right, False].index(False) + 1])
    each = torch.tensor(tokens), torch.tensor(fed), torch.tensor(depth)
    whole, count = kept(*each, len(batch), LONGEST + 1, torch.tensor(left))
    assert [row[:n] for row, n in zip(whole.tolist(), count.tolist(), strict=True)] == expected
    if not any(leaves for draft, _ in batch for *_, leaves in draft):
        assert torch.equal(kept(*each, len(batch), LONGEST + 1)[1], count)
