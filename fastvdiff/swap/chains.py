"""A norm between two convolutions that keep sizes: where kernels run those, it is no pass over memory of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvdiff import ops
from fastvdiff.ops.conv3d import impl_of
from fastvdiff.ops.norm_silu_conv3d import normalises_as_it_reads

from .frames import convolve, for_batch, onto, over_space
from .target import group_norm, in_own_dtype, plain


def convolved(
    conv: nn.Module, x: torch.Tensor, norm: nn.Module | None, channel_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """conv(x) + channel_bias + residual, x of frames (N, C, H, W) or a video, and its statistics for `norm`.

    channel_bias (N, C), (B or 1, C) or (B or 1, C, T), or None. The statistics are None without a norm, and where they
    would cost a pass.
    """
    sums = [term for term in (channel_bias, residual) if term is not None]
    fits = all(torch.promote_types(x.dtype, term.dtype) == x.dtype for term in sums)
    if fits and _keeps_sizes(conv, x):
        clip, weight = _as_video(x), _weight(conv)
        impl = impl_of(clip, weight, sums=bool(sums))
        if impl != "reference":
            groups = norm.num_groups if norm is not None and group_norm(norm) and impl == "cuda" else 0
            found = ops.conv3d(
                clip, weight, conv.bias, padding="same", channel_bias=for_batch(channel_bias, x),
                residual=None if residual is None else _as_video(residual), stats_groups=groups,
            )  # fmt: skip
            y, stats = found if groups else (found, None)
            return (y if x.dim() == 5 else y.squeeze(2)), stats
    if x.dim() == 5:
        return convolve(conv, x, channel_bias, residual), None
    y = conv(x)
    if channel_bias is not None:
        y = onto(y, over_space(channel_bias, y), plain(conv, nn.Conv2d))
    return (y if residual is None else onto(y, residual, plain(conv, nn.Conv2d))), None


def normalised(
    norm: Any, conv: nn.Module | None, x: torch.Tensor, stats: torch.Tensor | None, scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None, residual: torch.Tensor | None = None, then: nn.Module | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:  # fmt: skip
    """conv(SiLU(norm(x) * (1 + scale) + shift)) + residual by one kernel that normalises as it reads, else None.

    With it come its statistics for the norm `then`, if there is one.
    """
    fits = residual is None or torch.promote_types(x.dtype, residual.dtype) == x.dtype
    if stats is None or not fits or not _keeps_sizes(conv, x):
        return None
    clip, weight = _as_video(x), _weight(conv)
    if not normalises_as_it_reads(clip, weight, sums=residual is not None):
        return None
    found = ops.norm_silu_conv3d(
        clip, norm.num_groups, norm.weight, norm.bias, weight, conv.bias, eps=norm.eps, stats=stats,
        scale=for_batch(scale, x), shift=for_batch(shift, x), padding="same",
        residual=None if residual is None else _as_video(residual), stats_groups=0 if then is None else then.num_groups,
    )  # fmt: skip
    y, left = (found, None) if then is None else found
    return (y if x.dim() == 5 else y.squeeze(2)), left


def _keeps_sizes(conv: nn.Module | None, x: torch.Tensor) -> bool:
    """Whether `conv` is a plain convolution of x with zeros around and a result as large, in x's dtype."""
    if not (plain(conv, nn.Conv3d if x.dim() == 5 else nn.Conv2d) and in_own_dtype(x)):
        return False
    ones = (1,) * len(conv.kernel_size)
    halves = tuple(k // 2 for k in conv.kernel_size)
    odd = all(k % 2 for k in conv.kernel_size)
    same = conv.padding == "same" or (odd and conv.padding == halves)
    return same and conv.padding_mode == "zeros" and conv.stride == conv.dilation == ones and conv.groups == 1


def _as_video(x: torch.Tensor) -> torch.Tensor:
    """Frames as videos of one frame."""
    return x if x.dim() == 5 else x.unsqueeze(2)


def _weight(conv: nn.Module) -> torch.Tensor:
    return conv.weight if conv.weight.dim() == 5 else conv.weight.unsqueeze(2)
