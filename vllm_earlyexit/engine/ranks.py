"""Tensor parallelism: every rank drafts with its part of the model, and all do what the first one decides.

Ranks compute the same, but times, and what is learned from them, are each rank's own; ranks that disagree on what to
run next wait for one another for ever.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from vllm.distributed import (
    get_tp_group,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

A = TypeVar("A")
T = TypeVar("T")


def agreed(decide: Callable[[], T]) -> T:
    """Return what the first rank decides; on the others ``decide`` is not called."""
    group = get_tp_group()
    if group.world_size == 1:
        return decide()
    return group.broadcast_object(decide() if group.rank_in_group == 0 else None)


def run_by_first(work: Callable[[Callable[[A], T]], None], run: Callable[[A], T]) -> None:
    """Let the first rank do ``work`` with a ``run`` that runs on all ranks at the same time.

    Args:
        work: Only called on the first rank.
        run: What it calls, with an argument that is not None, as often as it likes.
    """
    group = get_tp_group()
    if group.rank_in_group == 0:

        def on_all(argument: A) -> T:
            agreed(lambda: argument)
            return run(argument)

        work(on_all)
        agreed(lambda: None)
    else:
        while (argument := agreed(lambda: None)) is not None:
            run(argument)


def own_part(whole: torch.Tensor, size: int) -> torch.Tensor:
    """Return this rank's ``size`` of the last dimension."""
    group = get_tp_group()
    return whole if group.world_size == 1 else whole.narrow(-1, group.rank_in_group * size, size)


def gathered(part: torch.Tensor) -> torch.Tensor:
    """Return all ranks' parts one after the other in the last dimension."""
    return part if get_tp_group().world_size == 1 else tensor_model_parallel_all_gather(part)


def rows_of(weight: torch.Tensor, first: int, count: int, rows: torch.Tensor) -> torch.Tensor:
    """Return rows of a matrix whose rows are spread over the ranks, [len(rows), columns], on every rank.

    Args:
        weight: This rank's part, perhaps with more rows behind it.
        first: Which row of the matrix is its first one.
        count: How many of the matrix's rows it has.
        rows: int64 [n].
    """
    if get_tp_group().world_size == 1:
        return weight[rows]
    here = (rows >= first) & (rows < first + count)
    found = weight[(rows - first).clamp(0, count - 1)]
    return tensor_model_parallel_all_reduce(found * here.unsqueeze(1))
