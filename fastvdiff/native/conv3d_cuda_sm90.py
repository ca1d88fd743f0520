"""conv3d on tensor copies and warpgroup products (csrc/cuda/conv3d_sm90.cu) beside the portable kernels.

Forward, and the data gradient of a stride of 1, which is a convolution with the taps turned round. The weight gradient
is cuDNN's, four times as fast on such a device as `conv3d_cuda`'s. What the kernel does not take (repeated edges, a
prefix, statistics, odd addresses), and weight gradients of paddings that cuDNN does not have, run on `conv3d_cuda`'s
kernels.
"""

from __future__ import annotations

import torch

from . import conv3d_cuda as portable
from . import library, multiprocessors, on_device, stream
from .conv3d_cuda import Geometry, Plan

__all__ = ["Geometry", "forward", "input_gradient", "plans", "weight_gradient"]

_Optional = torch.Tensor | None
_KERNEL = "cuda_conv3d_sm90"  # of the compiled module


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: _Optional, geometry: Geometry, prefix: _Optional,
    channel_bias: _Optional, residual: _Optional, stats_groups: int, out_size: tuple[int, ...], channels_last: bool,
    kernel: str = _KERNEL,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `conv3d_cuda.forward`."""
    call, y, stats = portable.forward_call(
        x, weight, bias, geometry, prefix, channel_bias, residual, stats_groups, out_size, channels_last
    )
    if y.numel() and not _done(call, x, kernel):
        call.run(portable.FORWARD, x)
    return y, stats


def input_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, prefix: _Optional,
    kernel: str = _KERNEL,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """As `conv3d_cuda.input_gradient`."""
    dx = torch.empty_like(x)
    turned = _turned_round(geometry, weight.shape[2:]) if prefix is None and dx.numel() else None
    if turned is not None:
        call, _, _ = portable.forward_call(
            grad, weight.transpose(0, 1).flip(2, 3, 4), None, turned, None, None, None, 0, tuple(x.shape[2:]), True,
            out=dx,
        )  # fmt: skip
        if _done(call, x, kernel):
            return dx, None
    return portable.input_gradient(grad, x, weight, geometry, prefix)


def weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, prefix: _Optional
) -> torch.Tensor:
    """As `conv3d_cuda.weight_gradient`; the order of cuDNN's sums is torch.backends.cudnn.deterministic's matter."""
    front, back = geometry.padding[::2], geometry.padding[1::2]
    if prefix is not None or any(geometry.replicate) or front != back or not grad.numel() or not x.numel():
        return portable.weight_gradient(grad, x, weight, geometry, prefix)
    found = torch.ops.aten.convolution_backward(
        grad, x, weight.to(x.dtype), None, geometry.stride, front, geometry.dilation, False, (0, 0, 0), 1,
        (False, True, False),
    )[1]  # fmt: skip
    return torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(found)


def plans(
    batch: int, channels: int, out_channels: int, size: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry,
    dtype: torch.dtype, count: int, launched: str = _KERNEL,
) -> dict[str, Plan]:  # fmt: skip
    """What the passes that the kernel runs launch on `count` multiprocessors, as `conv3d_cuda.plans`.

    `blocks` counts tiles, of which each multiprocessor takes one after another.
    """
    if dtype == torch.float32 or channels % 8 or out_channels % 8 or any(geometry.replicate):
        return {}
    call = portable.sized_call(batch, channels, out_channels, size, kernel, geometry, dtype)
    calls = {"forward": call}
    turned = _turned_round(geometry, kernel)
    if turned is not None:
        calls["data_gradient"] = portable.sized_call(
            batch, out_channels, channels, call.out_size, kernel, turned, dtype
        )
    plan = getattr(library(), f"{launched}_plan")
    return {name: Plan(*plan(each.numbers, count)) for name, each in calls.items()}


def _turned_round(geometry: Geometry, kernel: tuple[int, ...]) -> Geometry | None:
    """The convolution of the gradient that gives x's, or None where it is none that starts in the padding."""
    reach = [d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True) for _ in range(2)]
    padding = [r - p for r, p in zip(reach, geometry.padding, strict=True)]
    if geometry.stride != (1, 1, 1) or any(geometry.replicate) or min(padding[::2]) < 0:
        return None
    return geometry._replace(padding=tuple(padding))


def _done(call: portable.Call, x: torch.Tensor, kernel: str) -> bool:
    """Whether the kernel takes the call, and has been launched."""
    with on_device(x):
        return getattr(library(), f"{kernel}_forward")(*call.arguments(), multiprocessors(x), stream(x))
