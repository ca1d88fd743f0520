"""The sinusoidal encoding of a frame's index."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastvdiff import checks


class FrameEmbedding(nn.Module):
    """Sinusoidal frame-index encoding: sin in even channels, cos in odd ones; no parameters, any number of frames.

    Channel 2i of frame t holds sin(t / max_period^(2i / dim)), channel 2i + 1 the cos.

    Args:
        dim: channels, even.
        max_period: the longest wavelength is 2 pi times this.

    Raises:
        ValueError: `dim` is odd.

    Source: Vaswani et al., arXiv:1706.03762, section 3.5; added to the frames as in AnimateDiff, arXiv:2307.04725.
    """

    def __init__(self, dim: int, max_period: float = 10_000.0) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            checks.fail("FrameEmbedding", "dim", "an even number of channels", dim)
        self.dim, self.max_period = dim, max_period

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """(T,) positions, integers or fractions of a frame -> (T, dim) float32."""
        steps = torch.arange(0, self.dim, 2, device=positions.device, dtype=torch.float32)
        frequencies = torch.exp(steps * (-math.log(self.max_period) / self.dim))
        angles = positions.float()[:, None] * frequencies
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        return f"{self.dim}, max_period={self.max_period}"
