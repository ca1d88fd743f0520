"""A (B, C, *spatial) tensor as rows over memory, and the tiles that kernels read of it.

The tensor is walked as (B, C, S), S the positions in order. One of C and S is dense (stride 1): channels_last has rows
of C values, one row per position; contiguous has rows of S values, one row per channel.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Rows(NamedTuple):
    """A tensor with one dense dimension among C and S, and the strides of its batch and of its rows, in elements."""

    tensor: torch.Tensor
    stride_batch: int
    stride_row: int


def is_channels_last(t: torch.Tensor) -> bool:
    """Whether the channel is t's fastest dimension (in doubt, with C = 1 or one position, no)."""
    return t.stride(1) == 1 and t.shape[1] > 1 and not t.is_contiguous()


def rows_of(t: torch.Tensor, channels_last: bool) -> Rows:
    """t's rows in the asked format, or those of a copy where its strides do not allow them."""
    sizes, strides = t.shape[2:], t.stride()
    position = _position_stride(sizes, strides[2:])
    if channels_last and position is not None and strides[1] == 1:
        return Rows(t, strides[0], position)
    if not channels_last and position == 1:
        return Rows(t, strides[0], strides[1])
    return rows_of(_dense(t, channels_last), channels_last)


def _position_stride(sizes: torch.Size, strides: tuple[int, ...]) -> int | None:
    """The stride of spatial dimensions that walk memory as one, None where they do not, 1 for a single position."""
    walked = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size > 1]
    for (_, outer), (size, inner) in itertools.pairwise(walked):
        if outer != inner * size:
            return None
    return walked[-1][1] if walked else 1


def _dense(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """A copy of t in one of the two dense formats."""
    if not channels_last:
        # Not `contiguous()`: with sizes of 1 it returns t itself, whatever its strides there.
        return t.clone(memory_format=torch.contiguous_format)
    if t.dim() == 3:
        return t.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return t.clone(memory_format=_FORMATS[t.dim()])


def vector_unit(dense: int, *views: Rows) -> int:
    """The elements that every row of `dense` values can be read and written by: a power of two, 16 bytes at most.

    Kernels get sizes and strides as multiples of it: Triton then knows their alignment and makes 128-bit accesses,
    also where they are no multiple of the 16 that it tests for itself (C = 40).
    """
    most = 16 // max(view.tensor.element_size() for view in views)
    strides = (s for view in views for s in (view.stride_batch * (len(view.tensor) > 1), view.stride_row))
    return math.gcd(most, dense, *strides)


@triton.jit
def tile_offsets(rows, c, stride_row, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets (int64) of a block's positions `rows` and of channels c from the block's first position."""
    stride_row = stride_row.to(tl.int64) * UNIT
    if CHANNELS_LAST:
        return rows[:, None] * stride_row + c[None, :]
    return rows[:, None] + c[None, :] * stride_row


@triton.jit
def position_offset(first, stride_row, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The offset (int64) of position `first`."""
    return first * stride_row.to(tl.int64) * UNIT if CHANNELS_LAST else first


@triton.jit
def rows_inside(rows, first, S, BLOCK_S: tl.constexpr):
    """Which rows of the block at position `first` (int64) are among the S positions, without 64-bit compares."""
    return rows < tl.minimum(S - first, BLOCK_S).to(tl.int32)
