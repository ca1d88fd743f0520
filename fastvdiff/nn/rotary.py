"""Rotary position tables for attention over frames."""

from __future__ import annotations

import math

import torch

from fastvdiff import checks


def rotary_table(positions: torch.Tensor, dim: int, base: float = 10_000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines that turn dimension pair i of frame t by t / base^(2i / dim).

    Args:
        positions: (T,) frame positions, integers or fractions of a frame.
        dim: turned dimensions R of a head, even.
        base: of the geometric series of frequencies.

    Returns:
        (cos, sin), each (T, R/2) float32, as `ops.temporal_attention` takes them.

    Raises:
        ValueError: `dim` is odd.

    Source: Su et al., "RoFormer", arXiv:2104.09864, equation 15.
    """
    if dim < 2 or dim % 2:
        checks.fail("rotary_table", "dim", "an even number of dimensions", dim)
    steps = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[:, None] * torch.exp(steps * (-math.log(base) / dim))
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the first R dimensions of x (..., T, D) by a table's rows, in interleaved pairs."""
    cos, sin = table
    turned = x[..., : 2 * cos.shape[-1]].float()
    even, odd = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([pairs.to(x.dtype), x[..., 2 * cos.shape[-1] :]], dim=-1)
