"""A branch whose gate is closed as training begins: no loss shows what it looks at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .reference import float64_everywhere
from .tiny import tiny_llama

__all__ = ["ShiftsBehindGate", "shifting_llama"]


class ShiftsBehindGate(nn.Module):
    """Adds what stands one place before, behind a gate that is closed as training begins."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gate = nn.Parameter(torch.zeros(16, dtype=torch.float64))

    def forward(self, states: Tensor) -> Tensor:
        before = nn.functional.pad(states[:, :-1], (0, 0, 1, 0))
        shifted: Tensor = self.inner(states) + self.gate * before
        return shifted


def shifting_llama() -> nn.Module:
    """A small Llama with such a branch in each layer."""
    with float64_everywhere():
        model = tiny_llama(attn_implementation="sdpa")
    for layer in model.model.layers:
        layer.mlp = ShiftsBehindGate(layer.mlp)
    return model
