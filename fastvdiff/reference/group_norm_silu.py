"""GroupNorm (Wu & He 2018, arXiv:1803.08494), an affine modulation per sample, and SiLU."""

import torch
import torch.nn.functional as F

from .precision import accumulation_dtype


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
) -> torch.Tensor:
    """silu(group_norm(x) * (1 + scale) + shift), computed in the accumulation dtype and rounded once.

    x (B, C, *spatial); weight, bias (C,); scale, shift (B, C) or, for a 5-D x, (B, C, T).
    """
    wide = accumulation_dtype(x.dtype)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch's CPU backward fails on a bias alone
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch's own backward fails on a bias without a weight
    y = F.group_norm(x.to(wide), num_groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + _over_space(scale.to(wide), y.dim()))
    if shift is not None:
        y = y + _over_space(shift.to(wide), y.dim())
    if silu:
        y = F.silu(y)
    return y.to(x.dtype)


def _over_space(p: torch.Tensor, ndim: int) -> torch.Tensor:
    """(B, C) or (B, C, T) with trailing ones up to `ndim` dimensions."""
    return p.reshape(p.shape + (1,) * (ndim - p.dim()))
