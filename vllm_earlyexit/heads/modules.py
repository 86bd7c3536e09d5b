"""Exit heads: small modules between the hidden state at a cut and the model's own final norm and lm_head."""

from typing import Literal, assert_never

import torch
from torch import nn
from torch.nn import functional as F

HeadKind = Literal["shared", "linear", "mlp"]


class SharedHead(nn.Module):
    """LayerSkip's head: the hidden state goes to the final norm and lm_head as it is; nothing is trained.

    Elhoushi et al., LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, ACL 2024.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return ``hidden`` unchanged, [num_tokens, hidden_size]."""
        return hidden


class LinearHead(nn.Module):
    """Residual linear map. It starts as the identity, that is as the shared head."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.proj = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map [num_tokens, hidden_size] to features of the same shape."""
        return hidden + self.proj(hidden)


class MLPHead(nn.Module):
    """Residual gated MLP after an RMS norm of its own. It starts as the identity, that is as the shared head."""

    def __init__(self, hidden_size: int, intermediate_size: int, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map [num_tokens, hidden_size] to features of the same shape."""
        gate, up = self.gate_up(self.norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)


def build_head(kind: HeadKind, hidden_size: int, intermediate_size: int) -> nn.Module:
    """Return an untrained head of ``kind``; ``intermediate_size`` matters to ``mlp`` alone."""
    match kind:
        case "shared":
            return SharedHead()
        case "linear":
            return LinearHead(hidden_size)
        case "mlp":
            return MLPHead(hidden_size, intermediate_size)
    assert_never(kind)
