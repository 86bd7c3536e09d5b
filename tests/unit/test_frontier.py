import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_earlyexit.engine.frontier import Frontier


def slow_drafts(limits: list[int], sure: list[list[bool]]) -> list[list[int]]:
    """Draft one sequence after the other; the token drafted at depth d of sequence s is 100 * s + d."""
    drafts = []
    for sequence, limit in enumerate(limits):
        draft: list[int] = []
        while len(draft) < limit and sure[sequence][len(draft)]:
            draft.append(100 * sequence + len(draft))
        drafts.append(draft)
    return drafts


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_batched_drafting_equals_one_sequence_after_the_other(data: st.DataObject):
    n = data.draw(st.integers(1, 6))
    limits = data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    sure = data.draw(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=n, max_size=n))
    first = data.draw(st.lists(st.integers(0, 1000), min_size=n, max_size=n))

    frontier = Frontier(range(7, n + 7), first, limits, "cpu")
    while (step := frontier.step) is not None:
        rows = step.rows.tolist()
        depths = [position - first[row] for row, position in zip(rows, step.positions.tolist(), strict=True)]
        for row, depth, token in zip(rows, depths, step.input_ids.tolist(), strict=True):
            assert depth < limits[row], "a token past the reserved slots would be fed"
            assert token == (row + 7 if depth == 0 else 100 * row + depth - 1), "each token is fed once, in order"
        frontier.keep({"hidden": torch.stack([step.rows, step.positions], dim=1)}, cut=0)
        drafted = torch.tensor([100 * row + depth for row, depth in zip(rows, depths, strict=True)])
        frontier.advance(drafted, torch.tensor([sure[row][depth] for row, depth in zip(rows, depths, strict=True)]))

    assert frontier.drafts() == slow_drafts(limits, sure)
    for row in range(n):
        pending, draft = frontier.pending(row), frontier.drafts()[row]
        full = len(draft) == limits[row]
        # The last token of a full draft was never fed; that of another was, and its successor was not kept.
        assert pending == ([row + 7, *draft][:-1] if full else [row + 7, *draft]) or limits[row] == 0 == len(pending)
        if pending:
            kept = frontier.states([(row, column) for column in range(len(pending))])["hidden"]
            assert kept.tolist() == [[row, first[row] + column] for column in range(len(pending))]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_lifted_is_what_stands_at_the_cut(data: st.DataObject):
    """Sequences are lifted at will, exit by exit; each token's state says at which cut it was last run."""
    n, cuts = data.draw(st.integers(1, 4)), 3
    first = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    frontier = Frontier(range(n), first, [4] * n, "cpu")
    slow: list[list[int]] = [[] for _ in range(n)]
    while (step := frontier.step) is not None:
        frontier.keep({"cut": torch.zeros(len(step.rows), 1)}, cut=0)
        for row in step.rows.tolist():
            slow[row].append(0)
        rows = step.rows
        for cut in range(cuts - 1):
            rows = rows[torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))]
            if not len(rows):
                break
            standing = frontier.standing(rows.tolist(), cut)
            assert standing.states["cut"].flatten().tolist() == [cut] * int(standing.counts.sum())
            ends = [first[row] + len(slow[row]) for row in rows.tolist()]
            assert (standing.positions[standing.newest] + 1).tolist() == ends
            frontier.lift(standing, {"cut": torch.full((len(standing.positions), 1), cut + 1.0)}, cut + 1)
            for row in rows.tolist():
                slow[row] = [max(at, cut + 1) for at in slow[row]]
        keep = data.draw(st.lists(st.booleans(), min_size=len(step.rows), max_size=len(step.rows)))
        frontier.advance(step.rows, torch.tensor(keep))
    for row in range(n):
        assert frontier.cuts(row) == slow[row] == sorted(slow[row], reverse=True)
        kept = frontier.states([(row, column) for column in range(len(slow[row]))])["cut"]
        assert kept.flatten().tolist() == slow[row]


def test_a_round_without_room_has_no_step():
    frontier = Frontier([5], [3], [0], "cpu")
    assert frontier.step is None
    assert frontier.drafts() == [[]]
