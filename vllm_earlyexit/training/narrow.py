"""Heads with narrower MLPs: they keep the units that matter most, which take over from the others."""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from vllm_earlyexit.heads.modules import GatedMLP
from vllm_earlyexit.training.packs import on_device
from vllm_earlyexit.training.shards import Batch
from vllm_earlyexit.training.teacher import Teacher, draft_steps

RIDGE = 1e-3
"""Over the mean squared activation."""


def width_of(mlp: GatedMLP) -> int:
    """Return how many units an MLP has."""
    return mlp.down.in_features


@torch.no_grad()
def narrowed(teacher: Teacher, head: nn.Module, exit_layer: int, batch: Batch, width: int) -> nn.Module:
    """Return a head whose MLPs have at most ``width`` units: this one if it has no more, else a copy.

    Units are chosen by orthogonal least squares (Chen, Billings, Luo, Int. J. of Control, 1989): each next
    one explains most of what the MLP adds and the chosen ones do not explain yet. Their down projection is fitted by
    ridge regression to what all units add together.

    Args:
        teacher: The base model.
        head: A head; not changed.
        exit_layer: Where it sits.
        batch: What it is run on, draft step 0 only.
        width: Units of every MLP.
    """
    if not _wider(head, width):
        return head
    copy = deepcopy(head).to(teacher.device)
    wide = _wider(copy, width)
    grams = [torch.zeros(width_of(mlp), width_of(mlp)) for mlp in wide]

    def add(gram: torch.Tensor, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        units = inputs[0][: len(batch.ids)].float()  # without padding
        gram += (units.T @ units).cpu()

    hooks = [mlp.down.register_forward_pre_hook(partial(add, gram)) for mlp, gram in zip(wide, grams, strict=True)]
    with teacher.autocast():
        moved = on_device(batch, teacher.device)
        draft_steps(teacher, copy, moved.hidden[exit_layer], moved, pending=0)
    for hook in hooks:
        hook.remove()
    for mlp, gram in zip(wide, grams, strict=True):
        narrow(mlp, gram, width)
    return copy.cpu()


def _wider(head: nn.Module, width: int) -> list[GatedMLP]:
    """Return a head's MLPs that have more than ``width`` units."""
    return [mlp for mlp in head.modules() if isinstance(mlp, GatedMLP) and width_of(mlp) > width]


def narrow(mlp: GatedMLP, gram: torch.Tensor, width: int) -> None:
    """Keep ``width`` units of an MLP whose units' activations have this Gram matrix; see ``narrowed``."""
    added = gram @ mlp.down.weight.cpu().T
    kept = explaining(gram, added, width)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(width)
    fitted = torch.linalg.solve(gram[kept][:, kept] + ridge, added[kept]).T
    gate, up = (half[kept.to(half.device)] for half in mlp.gate_up.weight.chunk(2))
    for linear, weight in ((mlp.gate_up, torch.cat([gate, up])), (mlp.down, fitted)):
        linear.weight = nn.Parameter(weight.to(linear.weight))
        linear.out_features, linear.in_features = linear.weight.shape


def explaining(gram: torch.Tensor, added: torch.Tensor, count: int) -> torch.Tensor:
    """Return indices of ``count`` regressors that together explain most, ascending, int64 [count].

    Args:
        gram: Inner products of all regressors, [n, n].
        added: Their inner products with what is to be explained, [n, m].
        count: How many to choose.
    """
    if not added.any():
        return torch.arange(count)
    gram, added = gram.double(), added.double()
    least = 1e-9 * gram.diagonal().max()
    chosen = torch.zeros(len(gram), dtype=torch.bool)
    left = gram.diagonal().clone()  # squared length of what the chosen ones do not explain of each
    units = gram.new_zeros(count, len(gram))  # inner products with the chosen ones, made orthonormal
    for n in range(count):
        own = left.clamp(min=least)
        best = int((added.square().sum(dim=1) / own).masked_fill(chosen, -1).argmax())
        chosen[best] = True
        units[n] = (gram[best] - units[:n, best] @ units[:n]) / own[best].sqrt()
        added = added - torch.outer(units[n], added[best] / own[best].sqrt())
        left = left - units[n].square()
    return chosen.nonzero().squeeze(1)
