"""GEGLU (Shazeer 2020, arXiv:2002.05202, equation 6) of a projection whose two halves are h and gate."""

import torch
import torch.nn.functional as F

from .precision import accumulation_dtype


def geglu(x: torch.Tensor) -> torch.Tensor:
    """h * gelu(gate) with (h, gate) the halves of x (..., 2 D): (..., D), in the accumulation dtype, rounded once."""
    h, gate = x.to(accumulation_dtype(x.dtype)).chunk(2, dim=-1)
    return (h * F.gelu(gate)).to(x.dtype)
