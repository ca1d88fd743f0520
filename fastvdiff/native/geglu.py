"""geglu's CPU kernels (csrc/cpu/geglu.cpp)."""

from __future__ import annotations

import torch

from . import DTYPE_CODES, address, library, threads


def forward(x: torch.Tensor) -> torch.Tensor:
    """(rows, D) of (rows, 2 D), whose rows may lie apart."""
    y = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype, device="cpu")
    if y.numel():
        sizes = (*y.shape, x.stride(0), 0)
        library().geglu_forward(sizes, address(x), DTYPE_CODES[x.dtype], threads(), address(y))
    return y


def backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of x, contiguous."""
    dx = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    if dx.numel():
        sizes = (*grad.shape, x.stride(0), grad.stride(0))
        library().geglu_backward(sizes, address(x), DTYPE_CODES[x.dtype], threads(), address(grad), address(dx))
    return dx
