"""The gated feed-forward layer of diffusers' transformer blocks."""

from __future__ import annotations

import torch
from torch import nn

from fastvdiff.ops import geglu


class GEGLU(nn.Module):
    """`h * gelu(gate)` with (h, gate) the halves of one projection (Shazeer, arXiv:2002.05202, equation 6)."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU, dropout, linear: diffusers' `FeedForward` and its keys (net.0.proj, net.2).

    Args:
        dim: input channels.
        dim_out: output channels, `dim` if None.
        mult: the hidden layer has mult * dim channels.
        dropout: between the two layers.
        zero_init: start the last layer at 0.
    """

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, dropout: float = 0.0, *, zero_init: bool = False
    ) -> None:
        super().__init__()
        inner = dim * mult
        self.net = nn.ModuleList(
            [GEGLU(dim, inner), nn.Dropout(dropout), nn.Linear(inner, dim if dim_out is None else dim_out)]
        )
        if zero_init:
            nn.init.zeros_(self.net[2].weight)
            nn.init.zeros_(self.net[2].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim_out)."""
        for layer in self.net:
            x = layer(x)
        return x
