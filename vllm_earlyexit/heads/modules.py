"""Exit heads: small modules between the hidden state at a cut and the model's own final norm and lm_head."""

from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

import torch
from torch import nn
from torch.nn import functional as F

HeadKind = Literal["shared", "linear", "mlp", "tail", "recurrent"]
ATTENDING: tuple[HeadKind, ...] = ("tail", "recurrent")
"""Kinds that attend over the last layer's keys and values."""


class LastLayer(Protocol):
    """The attention of the model's last decoder layer, as a ``tail`` head sees it.

    Its keys and values are exact for verified tokens. For pending ones they are provisional: the last layer's own K/V
    projection of what the head has made of them.
    """

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the last layer's input norm to [..., hidden_size]."""

    def attend(self, query: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Attend with queries [..., query_size]; ``normed`` [..., hidden_size] gives the provisional keys and values.

        Positions are encoded here. Returns [..., query_size].
        """


@dataclass(frozen=True)
class Context:
    """What a head may look at besides its token's hidden state at the cut.

    Attributes:
        last: The last layer's attention, for kinds in ``ATTENDING``.
        previous: For ``recurrent`` heads, the token before: its hidden state after the last layer and the final norm
            if it is verified, the head's own normed features if it is pending; [..., hidden_size].
    """

    last: LastLayer
    previous: torch.Tensor


class SharedHead(nn.Module):
    """LayerSkip's head: the hidden state goes to the final norm and lm_head as it is; nothing is trained.

    Elhoushi et al., LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, ACL 2024.
    """

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """Return ``hidden`` unchanged, [..., hidden_size]."""
        return hidden


def _identity(size: int) -> nn.Linear:
    linear = nn.Linear(size, size)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class GatedMLP(nn.Module):
    """Residual gated MLP after an RMS norm of its own. It starts as the identity."""

    def __init__(self, hidden_size: int, intermediate_size: int, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map [..., hidden_size] to the same shape."""
        gate, up = self.gate_up(self.norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)


class LinearHead(nn.Module):
    """A linear map, as in tuned lens (Belrose et al., 2023). It starts as the identity, that is as the shared head."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.bridge = _identity(hidden_size)

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """Map [..., hidden_size] to features of the same shape."""
        return self.bridge(hidden)


class MLPHead(nn.Module):
    """A linear map and a residual gated MLP. It starts as the identity, that is as the shared head."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.bridge = _identity(hidden_size)
        self.mlp = GatedMLP(hidden_size, intermediate_size)

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """Map [..., hidden_size] to features of the same shape."""
        return self.mlp(self.bridge(hidden))


class TailHead(nn.Module):
    """A bridge from the cut to the last layer, then a trained layer over the last layer's keys and values.

    The last layer's KV holds what the full model has made of every verified token; the head needs neither a KV cache
    nor a prefill of its own. Bridge, queries, output projection and MLP are trained, the last layer's norm and K/V
    projection stay the model's.

    A recurrent head is also told what became of the token before, as in EAGLE (Li et al., ICML 2024): one linear map
    of the full model's final hidden state there, or of the head's own features where that token is pending.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, query_size: int, recurrent: bool):
        super().__init__()
        self.bridge = _identity(hidden_size)
        self.recurrence = nn.Linear(hidden_size, hidden_size, bias=False) if recurrent else None
        self.bridge_mlp = GatedMLP(hidden_size, intermediate_size)
        self.q_proj = nn.Linear(hidden_size, query_size)
        self.o_proj = nn.Linear(query_size, hidden_size, bias=False)
        self.mlp = GatedMLP(hidden_size, intermediate_size)
        nn.init.zeros_(self.q_proj.bias)
        nn.init.zeros_(self.o_proj.weight)

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """Map [..., hidden_size] to features of the same shape."""
        hidden = self.bridge(hidden)
        if self.recurrence is not None:
            hidden = hidden + self.recurrence(context.previous)
        hidden = self.bridge_mlp(hidden)
        normed = context.last.norm(hidden)
        hidden = hidden + self.o_proj(context.last.attend(self.q_proj(normed), normed))
        return self.mlp(hidden)


def build_head(kind: HeadKind, hidden_size: int, intermediate_size: int = 0, query_size: int = 0) -> nn.Module:
    """Return an untrained head of ``kind``.

    Args:
        kind: Which head.
        hidden_size: Of the model.
        intermediate_size: Width of the MLPs of ``mlp``, ``tail`` and ``recurrent``.
        query_size: Query heads times head size of the model's last layer, for kinds in ``ATTENDING``.
    """
    match kind:
        case "shared":
            return SharedHead()
        case "linear":
            return LinearHead(hidden_size)
        case "mlp":
            return MLPHead(hidden_size, intermediate_size)
        case "tail" | "recurrent":
            return TailHead(hidden_size, intermediate_size, query_size, recurrent=kind == "recurrent")
    assert_never(kind)
