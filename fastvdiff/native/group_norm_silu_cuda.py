"""group_norm_silu's CUDA kernels (csrc/cuda/group_norm_silu.cu)."""

from __future__ import annotations

import torch

from . import DTYPE_CODES, address, library, multiprocessors, on_device, stream, wide
from .rows import is_channels_last, positions, rows_of

_Optional = torch.Tensor | None
_F32 = DTYPE_CODES[torch.float32]


def forward(
    x: torch.Tensor, num_groups: int, weight: _Optional, bias: _Optional, eps: float, scale: _Optional,
    shift: _Optional, silu: bool, stats: _Optional,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The result, and the (B, G, 2) float32 mean and 1/std that the backward reads."""
    y = torch.empty_like(x)
    moments = torch.empty((x.shape[0], num_groups, 2), dtype=torch.float32, device=x.device)
    if not x.numel():
        return y, moments.zero_()
    channels_last = is_channels_last(y)
    rows, (x_view, y_view) = zip(*(view(t, channels_last) for t in (x, y)), strict=True)
    given = [readable(p) for p in (weight, bias, scale, shift)]
    stats = wide(stats)
    call = call_of(x, num_groups, given, channels_last, silu)
    lib = library()
    with on_device(x):
        workspace = _workspace(x, lib.cuda_group_norm_silu_workspace(*call, False))
        lib.cuda_group_norm_silu_forward(
            *call, stream(x), x_view, [parameter(p) for p in given], address(moments), address(workspace), y_view,
            address(stats), eps,
        )  # fmt: skip
    return (y if rows[1] is y else y.copy_(rows[1])), moments


def backward(
    grad: torch.Tensor, x: torch.Tensor, moments: torch.Tensor, num_groups: int, weight: _Optional, bias: _Optional,
    scale: _Optional, shift: _Optional, silu: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of x, weight, bias, scale and shift; an empty tensor for a parameter that is None."""
    dx = torch.empty_like(x)
    parameters = (weight, bias, scale, shift)
    given = [readable(p) for p in parameters]
    grads = [None if p is None else torch.empty(p.shape, dtype=p.dtype, device=x.device) for p in given]
    if x.numel():
        channels_last = is_channels_last(dx)
        rows, (x_view, grad_view, dx_view) = zip(*(view(t, channels_last) for t in (x, grad, dx)), strict=True)
        call = call_of(x, num_groups, given, channels_last, silu)
        lib = library()
        with on_device(x):
            workspace = _workspace(x, lib.cuda_group_norm_silu_workspace(*call, True))
            lib.cuda_group_norm_silu_backward(
                *call, stream(x), x_view, [parameter(p) for p in given], address(moments), address(workspace),
                grad_view, dx_view, [_gradient(g) for g in grads],
            )  # fmt: skip
        dx = dx if rows[2] is dx else dx.copy_(rows[2])
    else:
        grads = [None if g is None else g.zero_() for g in grads]
    return dx, *[
        x.new_empty(0) if g is None or p is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True)
    ]


def view(t: torch.Tensor, channels_last: bool) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """t, or a copy that stays alive with the caller, and its address, batch stride and stride of rows."""
    rows, (batch, channel, position) = rows_of(t, channels_last)
    return rows, (address(rows), batch, position if channels_last else channel)


def call_of(
    x: torch.Tensor, num_groups: int, given: list[_Optional], channels_last: bool, silu: bool
) -> tuple[tuple[int, ...], tuple[bool, bool], int, int]:
    """Sizes (batch, channels, positions, groups, frames), flags, dtype and the device's multiprocessors."""
    frames = max((p.shape[2] for p in given if p is not None and p.dim() == 3), default=1)
    sizes = (*x.shape[:2], positions(x), num_groups, frames)
    return sizes, (silu, channels_last), DTYPE_CODES[x.dtype], multiprocessors(x)


def _workspace(x: torch.Tensor, floats: int) -> torch.Tensor:
    return torch.empty(floats, dtype=torch.float32, device=x.device)


def readable(p: _Optional) -> _Optional:
    """A parameter in a dtype that the kernels read; strides stay as they are."""
    return p if p is None or p.dtype in DTYPE_CODES else p.detach().to(torch.float32)


def parameter(p: _Optional) -> tuple[int, int, int, int, int]:
    """Address, strides over samples, channels and frames, dtype of a (C,), (B, C) or (B, C, frames) parameter."""
    if p is None:
        return 0, 0, 0, 0, _F32
    strides = (0, *p.stride(), 0) if p.dim() == 1 else (*p.stride(), 0)[:3]
    return address(p), *strides, DTYPE_CODES[p.dtype]


def _gradient(g: _Optional) -> tuple[int, bool, int]:
    """Address, whether it has frames, dtype of a contiguous gradient."""
    return (0, False, _F32) if g is None else (address(g), g.dim() == 3, DTYPE_CODES[g.dtype])
