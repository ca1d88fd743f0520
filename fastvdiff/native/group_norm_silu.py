"""group_norm_silu's CPU kernels (csrc/cpu/group_norm_silu.cpp)."""

from __future__ import annotations

import torch

from . import DTYPE_CODES, address, library, threads, wide
from .rows import is_channels_last, positions, rows_of

_Optional = torch.Tensor | None


def forward(
    x: torch.Tensor, num_groups: int, weight: _Optional, bias: _Optional, eps: float, scale: _Optional,
    shift: _Optional, silu: bool, stats: _Optional,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The result, and the (B, G, 2) float32 mean and 1/std that the backward reads."""
    y = torch.empty_like(x)
    moments = torch.empty((x.shape[0], num_groups, 2), dtype=torch.float32, device="cpu")
    if not x.numel():
        return y, moments.zero_()
    channels_last = is_channels_last(y)
    x_rows, x_strides = rows_of(x, channels_last)
    y_rows, y_strides = rows_of(y, channels_last)
    scale, shift, frames = _modulation(scale, shift)
    weight, bias, stats = wide(weight), wide(bias), wide(stats)
    sizes = (*x.shape[:2], positions(x), num_groups, frames)
    lib = library()
    workspace = torch.empty(lib.group_norm_silu_workspace(sizes, x_strides), dtype=torch.float32, device="cpu")
    lib.group_norm_silu_forward(
        sizes, address(x_rows), x_strides, address(weight), address(bias), address(scale), address(shift),
        address(moments), address(workspace), silu, DTYPE_CODES[x.dtype], threads(),
        address(y_rows), y_strides, address(stats), eps,
    )  # fmt: skip
    return (y if y_rows is y else y.copy_(y_rows)), moments


def backward(
    grad: torch.Tensor, x: torch.Tensor, moments: torch.Tensor, num_groups: int, weight: _Optional, bias: _Optional,
    scale: _Optional, shift: _Optional, silu: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of x, weight, bias, scale and shift; an empty tensor for a parameter that is None."""
    dx = torch.empty_like(x)
    parameters = (weight, bias, scale, shift)
    if not x.numel():
        return dx, *[_absent(x) if p is None else torch.zeros(p.shape, dtype=p.dtype) for p in parameters]
    channels_last = is_channels_last(dx)
    x_rows, x_strides = rows_of(x, channels_last)
    dx_rows, dx_strides = rows_of(dx, channels_last)
    grad_rows, grad_strides = rows_of(grad, channels_last)
    wide_scale, wide_shift, frames = _modulation(scale, shift)
    wide_weight, wide_bias = wide(weight), wide(bias)
    grads = [None if p is None else torch.empty_like(p) for p in (wide_weight, wide_bias, wide_scale, wide_shift)]
    sizes = (*x.shape[:2], positions(x), num_groups, frames)
    lib = library()
    workspace = torch.empty(lib.group_norm_silu_workspace(sizes, x_strides), dtype=torch.float32, device="cpu")
    lib.group_norm_silu_backward(
        sizes, address(x_rows), x_strides, address(wide_weight), address(wide_bias), address(wide_scale),
        address(wide_shift), address(moments), address(workspace), silu, DTYPE_CODES[x.dtype], threads(),
        address(grad_rows), grad_strides, address(dx_rows), dx_strides, *map(address, grads),
    )  # fmt: skip
    return (
        dx if dx_rows is dx else dx.copy_(dx_rows),
        *[_absent(x) if p is None else _as_parameter(g, p) for g, p in zip(grads, parameters, strict=True)],
    )


def _absent(x: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter that is None."""
    return x.new_empty(0)


def _modulation(scale: _Optional, shift: _Optional) -> tuple[_Optional, _Optional, int]:
    """scale and shift as (B, C, frames) float32, and the number of frames: 1 unless either is (B, C, T)."""
    if scale is None and shift is None:
        return None, None, 1
    frames = max((p.shape[2] for p in (scale, shift) if p is not None and p.dim() == 3), default=1)
    if frames > 1:
        scale, shift = (p if p is None or p.dim() == 3 else p[..., None].expand(-1, -1, frames) for p in (scale, shift))
    return wide(scale), wide(shift), frames


def _as_parameter(grad: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A float32 gradient in its parameter's shape and dtype; a (B, C) one sums over the frames it was spread over."""
    if grad.shape == parameter.shape and grad.dtype is parameter.dtype:
        return grad
    if grad.dim() > parameter.dim():
        grad = grad.sum(dim=2)
    return grad.view(parameter.shape).to(parameter.dtype)
