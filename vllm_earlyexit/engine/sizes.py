"""Numbers of tokens for which kernels exist already: on CPUs a pass over some tokens is run as one of few sizes.

vLLM's matrix products on CPUs are oneDNN's, which makes a kernel for every number of rows and size of matrix that it
meets, and keeps few of them: 32 for a layer, 1,024 in all. Plain decoding meets one number of rows for every size of
its batch. Drafts make that the number of tokens that were worth drafting, so that kernels would be made again and
again. With at most an eighth more rows there are 64 sizes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch.nn.functional import pad
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, override_forward_context

MOST, COARSEST = 512, 16
"""Rows from which on a kernel is made in little of the time that it runs, and rows between two sizes at most."""
NO_SLOT = -1
"""vLLM's slot of tokens whose KV is not kept."""


def applies(vllm_config: VllmConfig) -> bool:
    """Return whether to pad: on CPUs, without LoRA adapters, which have a number for every token of the batch."""
    return vllm_config.device_config.device_type == "cpu" and vllm_config.lora_config is None


def padded_size(rows: int) -> int:
    """Return the size to run so many rows as, at least as many."""
    if rows > MOST:
        return rows
    step = min(COARSEST, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def with_rows(table: torch.Tensor, more: int) -> torch.Tensor:
    """Return [n, ...] with so many rows of zeros behind it."""
    return pad(table, (0, 0) * (table.dim() - 1) + (0, more))


@contextmanager
def more_tokens(more: int) -> Iterator[None]:
    """The current forward context with ``more`` tokens, whose KV is not kept."""
    context: Any = copy(get_forward_context())
    slots: Mapping[str, torch.Tensor] = context.slot_mapping
    padded = {id(of_group): pad(of_group, (0, more), value=NO_SLOT) for of_group in slots.values()}
    context.slot_mapping = {layer: padded[id(of_group)] for layer, of_group in slots.items()}
    with override_forward_context(context):
        yield
