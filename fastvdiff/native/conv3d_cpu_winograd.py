"""conv3d's C++ kernels (csrc/cpu/conv3d.cpp): Winograd's minimal filtering."""

from __future__ import annotations

from typing import Any

import torch

from . import DTYPE_CODES, address, library, threads, wide
from .conv3d_cuda import Geometry, empty

__all__ = ["Geometry", "forward", "input_gradient", "weight_gradient"]

_Optional = torch.Tensor | None


class Call:
    """A forward whose result, sizes, strides and workspace are worked out: for all tensors that lie like these.

    What it is called with is as `forward` makes it: the parameters float32, `bias` contiguous, `channel_bias` likewise,
    as (B, 1 or T_out, C_out).
    """

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, channel_bias: _Optional, residual: _Optional, geometry: Geometry,
        out_size: tuple[int, ...], channels_last: bool,
    ) -> None:  # fmt: skip
        self._shape = (x.shape[0], weight.shape[0], *out_size)
        self._format = torch.channels_last_3d if channels_last else torch.contiguous_format
        frames = 1 if channel_bias is None else channel_bias.shape[1]
        self._numbers = _numbers(x, weight, tuple(out_size), geometry.padding[::2], geometry.replicate, frames)
        y = torch.empty(self._shape, dtype=x.dtype, device="meta", memory_format=self._format)
        self._strides = _strides(x, weight, y, residual)
        self._workspace = library().conv3d_workspace(self._numbers)

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: _Optional, channel_bias: _Optional, residual: _Optional
    ) -> torch.Tensor:
        """The result."""
        y = torch.empty(self._shape, dtype=x.dtype, device="cpu", memory_format=self._format)
        workspace = torch.empty(self._workspace, dtype=torch.float32, device="cpu")
        addresses = tuple(map(address, (x, weight, bias, channel_bias, residual, y, workspace)))
        library().conv3d_forward(self._numbers, addresses, self._strides)
        return y


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: _Optional, geometry: Geometry, prefix: None, channel_bias: _Optional,
    residual: _Optional, stats_groups: int, out_size: tuple[int, ...], channels_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The result, in channels_last_3d if asked for, and no statistics: the op works those out (`stats_groups` is 0)."""
    assert prefix is None
    assert not stats_groups
    statistics = x.new_empty((x.shape[0], 0, 2), dtype=torch.float32)
    if 0 in x.shape[:1] or 0 in out_size:
        return empty((x.shape[0], weight.shape[0], *out_size), x, channels_last), statistics
    if channel_bias is not None:
        channel_bias = wide(channel_bias.unsqueeze(1) if channel_bias.dim() == 2 else channel_bias.transpose(1, 2))
    if residual is not None:
        residual = residual.to(x.dtype)
    weight = weight.detach().to(torch.float32)
    call = Call(x, weight, channel_bias, residual, geometry, out_size, channels_last)
    return call(x, weight, wide(bias), channel_bias, residual), statistics


def input_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, prefix: None
) -> tuple[torch.Tensor, None]:
    """dx, with the strides of `torch.empty_like(x)`: the flipped kernel over grad, zeros around."""
    dx = torch.empty_like(x)
    if dx.numel():
        before = tuple(k - 1 - p for k, p in zip(weight.shape[2:], geometry.padding[::2], strict=True))
        weight = weight.detach().to(torch.float32).transpose(0, 1)
        numbers = _numbers(grad, weight, tuple(dx.shape[2:]), before, (False,) * 3, flipped=True)
        workspace = torch.empty(library().conv3d_workspace(numbers), dtype=torch.float32, device="cpu")
        addresses = tuple(map(address, (grad, weight, None, None, None, dx, workspace)))
        library().conv3d_forward(numbers, addresses, _strides(grad, weight, dx, None))
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


def _strides(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, residual: _Optional) -> tuple[Any, ...]:
    return x.stride(), weight.stride(), y.stride(), (0,) * 5 if residual is None else residual.stride()


def _numbers(
    x: torch.Tensor, weight: torch.Tensor, out_size: tuple[int, ...], before: tuple[int, ...],
    replicate: tuple[bool, ...], bias_frames: int = 1, flipped: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Conv3dCpuParams from its batch on."""
    return (
        x.shape[0], x.shape[1], weight.shape[0], *x.shape[2:], *out_size, *weight.shape[2:], *before, *replicate,
        bias_frames, flipped, DTYPE_CODES[x.dtype], threads(),
    )  # fmt: skip
