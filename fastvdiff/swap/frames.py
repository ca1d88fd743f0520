"""Frames, videos and tokens: the views between them, and the sums that end a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvdiff import ops

from .target import in_own_dtype, plain


def as_video(frames: torch.Tensor, num_frames: int) -> torch.Tensor:
    """(B*T, C, H, W) as a view (B, C, T, H, W)."""
    return frames.unflatten(0, (-1, num_frames)).transpose(1, 2)


def as_frames(video: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) as (B*T, C, H, W); a view where the strides allow one."""
    return video.transpose(1, 2).flatten(0, 1)


def dense(video: torch.Tensor, as_eager: bool = False) -> torch.Tensor:
    """`video` as it is if it is contiguous or in channels_last_3d, else a copy: a norm reads other strides slowly.

    On a CPU the copy is in channels_last_3d, which convolutions over frames are fastest in. `as_eager`: in the format
    that torch's own GroupNorm gives, which decides where Dropout puts its random numbers; it keeps channels_last_3d on
    a CPU only.
    """
    on_cpu = video.device.type == "cpu"
    if (on_cpu or not as_eager) and video.is_contiguous(memory_format=torch.channels_last_3d):
        return video
    if on_cpu and not as_eager and not video.is_contiguous():
        return video.contiguous(memory_format=torch.channels_last_3d)
    return video.contiguous()


def convolve(
    conv: nn.Module, x: torch.Tensor, channel_bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """conv(x) + channel_bias, (B or 1, C), (B or 1, C, T) or None, + residual, of the result's shape or None.

    A plain Conv3d goes through its cheapest view, any other is called.
    """
    if plain(conv, nn.Conv3d) and conv.padding_mode == "zeros":
        fused = residual is not None and in_own_dtype(x) and torch.promote_types(x.dtype, residual.dtype) == x.dtype
        y = ops.conv3d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
                       channel_bias=for_batch(channel_bias, x), residual=residual if fused else None)  # fmt: skip
        return y if fused or residual is None else y + residual
    y = conv(x)
    if channel_bias is not None:
        y = y + over_space(channel_bias, y)
    return y if residual is None else y + residual


def for_batch(modulation: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """A modulation of one sample for every sample of x: a network called with one time step for all."""
    if modulation is None or modulation.shape[0] == x.shape[0]:
        return modulation
    return modulation.expand(x.shape[0], *modulation.shape[1:])


def over_space(channel_bias: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A channel_bias (B, C) or (B, C, T) as it broadcasts over y."""
    return channel_bias[(..., *[None] * (y.dim() - channel_bias.dim()))]


def onto(y: torch.Tensor, term: torch.Tensor, owned: Any = True) -> torch.Tensor:
    """y + term, in y's own memory where nobody else holds it (`owned`) and autograd does not record."""
    if owned and not torch.is_grad_enabled() and torch.promote_types(y.dtype, term.dtype) == y.dtype:
        return y.add_(term)
    return y + term
