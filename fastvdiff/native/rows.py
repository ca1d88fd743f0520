"""A (B, C, *spatial) tensor as the rows that the norm's kernels walk, CPU and CUDA."""

from __future__ import annotations

import torch

_Strides = tuple[int, int, int]
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def positions(t: torch.Tensor) -> int:
    """Values of a channel of one sample; t is not empty."""
    return t.numel() // (t.shape[0] * t.shape[1])


def is_channels_last(t: torch.Tensor) -> bool:
    """Whether the channel is t's fastest dimension (in doubt, with C = 1 or one position, no)."""
    return t.stride(1) == 1 and t.shape[1] > 1 and not t.is_contiguous()


def rows_of(t: torch.Tensor, channels_last: bool) -> tuple[torch.Tensor, _Strides]:
    """t, or a copy where its strides do not allow it, and the strides of its (B, C, S) view.

    The channel stride of that view is 1 if `channels_last`, else its position stride.
    """
    if not channels_last and t.is_contiguous():
        row = positions(t)
        return t, (t.shape[1] * row, row, 1)
    if channels_last and t.dim() > 3 and t.is_contiguous(memory_format=_FORMATS[t.dim()]):
        return t, (t.shape[1] * positions(t), 1, t.shape[1])
    strides = t.stride()
    position = _position_stride(t.shape[2:], strides[2:])
    if position is None or (strides[1] if channels_last else position) != 1:
        return rows_of(_copy(t, channels_last), channels_last)
    return t, (strides[0], strides[1], position)


def _position_stride(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The stride of spatial dimensions that walk memory as one, None where they do not, 1 for a single position."""
    stride = None
    expected = 0
    for size, own in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = own
        elif own != expected:
            return None
        expected = own * size
    return 1 if stride is None else stride


def _copy(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """t in one of the two dense formats."""
    if not channels_last:
        return t.contiguous()
    if t.dim() == 3:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    return t.contiguous(memory_format=_FORMATS[t.dim()])
