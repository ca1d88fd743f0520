"""The embedding of the diffusion time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastvdiff import checks


def timestep_embedding(
    timesteps: torch.Tensor,
    embedding_dim: int,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1,
    scale: float = 1,
    max_period: int = 10_000,
) -> torch.Tensor:
    """Sinusoidal timestep embedding, argument for argument diffusers' `get_timestep_embedding`.

    Args:
        timesteps: (B,) times, possibly fractional.
        embedding_dim: channels; an odd one gets a zero at the end.
        flip_sin_to_cos: cos first instead of sin first.
        downscale_freq_shift: subtracted from the number of frequencies in the exponent's denominator.
        scale: factor of the angles.
        max_period: the lowest frequency is 1 / max_period.

    Returns:
        (B, embedding_dim) float32.

    Raises:
        ValueError: timesteps are not (B,).

    Source: Ho et al., "DDPM", arXiv:2006.11239, appendix B.
    """
    if timesteps.dim() != 1:
        checks.fail("timestep_embedding", "timesteps", "shape (B,)", tuple(timesteps.shape))
    half = embedding_dim // 2
    exponents = -math.log(max_period) * torch.arange(half, device=timesteps.device, dtype=torch.float32)
    frequencies = torch.exp(exponents / (half - downscale_freq_shift))
    angles = scale * (timesteps.float()[:, None] * frequencies)
    halves = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(halves, dim=-1), (0, embedding_dim % 2))


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, linear on a sinusoidal embedding: diffusers' `TimestepEmbedding` and its keys.

    Args:
        in_channels: channels of the sinusoidal embedding.
        time_embed_dim: channels of the result, and of the hidden layer.
        out_dim: channels of the result where they differ from the hidden layer's.
    """

    def __init__(self, in_channels: int, time_embed_dim: int, out_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim if out_dim is None else out_dim)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """(B, in_channels) -> (B, out_dim)."""
        return self.linear_2(F.silu(self.linear_1(sample)))
