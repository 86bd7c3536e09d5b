import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_earlyexit.engine.sizes import MOST, padded_size, with_rows


@given(st.integers(1, 4 * MOST))
def test_a_pass_is_at_most_an_eighth_larger_and_small_or_large_ones_are_as_they_are(rows: int):
    size = padded_size(rows)
    assert rows <= size <= rows + rows / 8
    assert padded_size(size) == size
    if rows <= 16 or rows > MOST:
        assert size == rows


def test_there_are_few_sizes():
    assert len({padded_size(rows) for rows in range(1, MOST + 1)}) == 64
    assert len({padded_size(rows) for rows in range(32, 65)}) == 9


def test_rows_are_added_behind():
    table = torch.arange(6).reshape(3, 2)
    assert with_rows(table, 2).tolist() == [[0, 1], [2, 3], [4, 5], [0, 0], [0, 0]]
    assert with_rows(table[:, 0], 1).tolist() == [0, 2, 4, 0]
