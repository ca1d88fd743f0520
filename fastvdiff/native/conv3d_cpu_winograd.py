"""conv3d's C++ kernels (csrc/cpu/conv3d.cpp): Winograd's minimal filtering."""

from __future__ import annotations

from typing import Any

import torch

from . import DTYPE_CODES, address, library, threads, wide
from .conv3d_cuda import Geometry, empty

__all__ = ["Geometry", "forward", "input_gradient", "weight_gradient"]

_Optional = torch.Tensor | None


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: _Optional, geometry: Geometry, prefix: None, channel_bias: _Optional,
    residual: _Optional, stats_groups: int, out_size: tuple[int, ...], channels_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The result, in channels_last_3d if asked for, and no statistics: the op works those out (`stats_groups` is 0)."""
    assert prefix is None
    assert not stats_groups
    y = empty((x.shape[0], weight.shape[0], *out_size), x, channels_last)
    if y.numel():
        by_frame = channel_bias
        if channel_bias is not None:
            by_frame = wide(channel_bias.unsqueeze(1) if channel_bias.dim() == 2 else channel_bias.transpose(1, 2))
        frames = 1 if by_frame is None else by_frame.shape[1]
        if residual is not None:
            residual = residual.to(x.dtype)
        _run(x, weight, y, geometry.padding[::2], geometry.replicate, bias, by_frame, residual, frames)
    return y, x.new_empty((x.shape[0], 0, 2), dtype=torch.float32)


def input_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, prefix: None
) -> tuple[torch.Tensor, None]:
    """dx, with the strides of `torch.empty_like(x)`: the flipped kernel over grad, zeros around."""
    dx = torch.empty_like(x)
    if dx.numel():
        before = tuple(k - 1 - p for k, p in zip(weight.shape[2:], geometry.padding[::2], strict=True))
        _run(grad, weight.transpose(0, 1), dx, before, (False,) * 3, flipped=True)
    return dx, None


def weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, prefix: None
) -> torch.Tensor:
    """The gradient of the weight, in its dtype and contiguous."""
    sums = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    if not grad.numel():
        return sums.zero_().to(weight.dtype)
    numbers = _numbers(x, weight, tuple(grad.shape[2:]), geometry.padding[::2], geometry.replicate)
    workspace = torch.empty(library().conv3d_weight_gradient_workspace(numbers), dtype=torch.float32, device="cpu")
    addresses = (address(x), address(grad), address(sums), address(workspace))
    library().conv3d_weight_gradient(numbers, addresses, (x.stride(), grad.stride()))
    return sums.to(weight.dtype)


def _run(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, before: tuple[int, ...], replicate: tuple[bool, ...],
    bias: _Optional = None, channel_bias: _Optional = None, residual: _Optional = None, bias_frames: int = 1,
    flipped: bool = False,
) -> None:  # fmt: skip
    """y = conv(x, weight) + bias + channel_bias + residual; any strides."""
    weight, bias = weight.detach().to(torch.float32), wide(bias)
    numbers = _numbers(x, weight, tuple(y.shape[2:]), before, replicate, bias_frames, flipped)
    workspace = torch.empty(library().conv3d_workspace(numbers), dtype=torch.float32, device="cpu")
    addresses = tuple(address(t) for t in (x, weight, bias, channel_bias, residual, y, workspace))
    none = (0,) * 5
    strides = (x.stride(), weight.stride(), y.stride(), none if residual is None else residual.stride())
    library().conv3d_forward(numbers, addresses, strides)


def _numbers(
    x: torch.Tensor, weight: torch.Tensor, out_size: tuple[int, ...], before: tuple[int, ...],
    replicate: tuple[bool, ...], bias_frames: int = 1, flipped: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Conv3dCpuParams from its batch on."""
    return (
        x.shape[0], x.shape[1], weight.shape[0], *x.shape[2:], *out_size, *weight.shape[2:], *before, *replicate,
        bias_frames, flipped, DTYPE_CODES[x.dtype], threads(),
    )  # fmt: skip
