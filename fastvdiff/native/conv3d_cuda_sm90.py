"""conv3d on tensor copies and warpgroup products (csrc/cuda/conv3d_sm90.cu) beside the portable kernels.

Forward, and the data gradient of a stride of 1, which is a convolution with the taps turned round. What the kernel does
not take (repeated edges, a prefix, statistics, odd addresses) and the weight gradient run on `conv3d_cuda`'s kernels.
"""

from __future__ import annotations

import torch

from . import conv3d_cuda as portable
from . import library, multiprocessors, on_device, stream
from .conv3d_cuda import Geometry, weight_gradient

__all__ = ["Geometry", "forward", "input_gradient", "weight_gradient"]

_Optional = torch.Tensor | None


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: _Optional, geometry: Geometry, prefix: _Optional,
    channel_bias: _Optional, residual: _Optional, stats_groups: int, out_size: tuple[int, ...], channels_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `conv3d_cuda.forward`."""
    call, y, stats = portable.forward_call(
        x, weight, bias, geometry, prefix, channel_bias, residual, stats_groups, out_size, channels_last
    )
    if y.numel() and not _done(call, x):
        call.run(portable.FORWARD, x)
    return y, stats


def input_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, prefix: _Optional
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `conv3d_cuda.input_gradient`."""
    plain = geometry.stride == (1, 1, 1) and not any(geometry.replicate) and prefix is None
    dx = torch.empty_like(x)
    if plain and dx.numel():
        kernel = weight.shape[2:]
        before = [d * (k - 1) - p for d, k, p in zip(geometry.dilation, kernel, geometry.padding[::2], strict=True)]
        if min(before) >= 0:
            call, _, _ = portable.forward_call(
                grad, weight.transpose(0, 1).flip(2, 3, 4), None,
                geometry._replace(padding=tuple(n for b in before for n in (b, 0))), None, None, None, 0,
                tuple(x.shape[2:]), True, out=dx,
            )  # fmt: skip
            if _done(call, x):
                return dx, None
    return portable.input_gradient(grad, x, weight, geometry, prefix)


def _done(call: portable.Call, x: torch.Tensor) -> bool:
    """Whether the kernel takes the call, and has been launched."""
    with on_device(x):
        return library().cuda_conv3d_sm90_forward(*call.arguments(), multiprocessors(x), stream(x))
