"""What the phases of group_norm_silu share: the affine map per channel, the activation, and how the work is cut."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import launch
from .channel_rows import Rows, vector_unit

_Optional = torch.Tensor | None
_INTERPRETED = tl.constexpr(launch.INTERPRETED)
# A program that starts reads moments and parameters first: about the time of so many blocks.
_START = 2
# The most programs that the blocks are dealt to, in rounds of programs that run at once: more only costs starts.
_ROUNDS = 4
# Strides and sizes in these arguments change from call to call: none of them is worth a compiled kernel of its own.
STRIDES = ("stride_scale_b", "stride_scale_c", "stride_scale_t", "stride_shift_b", "stride_shift_c", "stride_shift_t")


class Affine(NamedTuple):
    """The parameters of a call and how they are spread: weight and bias (C,), scale and shift (B, C[, frames])."""

    weight: _Optional
    bias: _Optional
    scale: _Optional
    shift: _Optional
    frames: int

    def arguments(self) -> tuple[Any, ...]:
        """As `affine`'s callers take them."""
        return *self[:4], *_strides(self.scale), *_strides(self.shift)


def affine_of(weight: _Optional, bias: _Optional, scale: _Optional, shift: _Optional) -> Affine:
    """Any dtype and strides; frames is 1 unless scale or shift is (B, C, T)."""
    frames = max((p.shape[2] for p in (scale, shift) if p is not None and p.dim() == 3), default=1)
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    return Affine(weight, bias, scale, shift, frames)


def _strides(p: _Optional) -> tuple[int, int, int]:
    """Batch, channel and frame stride; frame 0 where every frame has the same."""
    if p is None:
        return 0, 0, 0
    return p.stride(0), p.stride(1), p.stride(2) if p.dim() == 3 else 0


class Sizes(NamedTuple):
    """The sizes of a call; `positions` are a frame's. C and S count in units that a row can be accessed by."""

    batch: int
    channels: int
    positions: int
    frames: int
    groups: int
    channels_last: bool
    unit: int

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.channels // self.groups

    @property
    def units(self) -> tuple[int, int]:
        """(C_UNIT, S_UNIT): the unit of the dense dimension, 1 for the other."""
        return (self.unit, 1) if self.channels_last else (1, self.unit)

    def strides(self, *views: Rows) -> tuple[int, ...]:
        """Batch and row stride of each, in units."""
        return tuple(s // self.unit for view in views for s in (view.stride_batch, view.stride_row))

    def extents(self) -> tuple[int, int]:
        """C and a frame's S, in units."""
        c_unit, s_unit = self.units
        return self.channels // c_unit, self.positions // s_unit


def sizes_of(channels_last: bool, groups: int, frames: int, *views: Rows) -> Sizes:
    """The sizes of a call on tensors of one shape."""
    batch, channels = views[0].tensor.shape[:2]
    positions = views[0].tensor.numel() // (batch * channels * frames)
    unit = vector_unit(channels if channels_last else positions, *views)
    return Sizes(batch, channels, positions, frames, groups, channels_last, unit)


class Cut(NamedTuple):
    """How a pass over (work, rows) is cut: `columns` blocks of channels, blocks of rows dealt to `parts` programs."""

    block_s: int
    block_c: int
    columns: int
    parts: int
    programs: int

    def constants(self) -> dict[str, int]:
        """The tile, as the kernels take it."""
        return {"BLOCK_S": self.block_s, "BLOCK_C": self.block_c}


def cut(x: torch.Tensor, sizes: Sizes, by_frame: bool, configuration: launch.Configuration) -> Cut:
    """Cut x over the whole device, a program's rows within one sample or, `by_frame`, within one frame."""
    slots = launch.multiprocessors(x) * configuration["PROGRAMS"]
    return _cut(sizes, by_frame, x.element_size(), slots, configuration["BLOCK"], configuration["SEGMENT"])


@functools.lru_cache(maxsize=4096)
def _cut(sizes: Sizes, by_frame: bool, element_size: int, slots: int, block: int, segment: int) -> Cut:
    work, positions = sizes.batch * sizes.frames, sizes.positions
    if not by_frame:
        work, positions = sizes.batch, positions * sizes.frames
    if sizes.channels_last:
        # A row of 128 bytes is a full line; more of it is left to programs beside, which run at the same time.
        block_c = _dense_block(sizes.channels, segment // element_size)
        block_s = min(block // block_c, triton.next_power_of_2(positions))
    else:
        block_s = _dense_block(positions, block)
        block_c = min(block // block_s, triton.next_power_of_2(sizes.channels), 128)
    columns = triton.cdiv(sizes.channels, block_c)
    dealt = parts(work * columns, triton.cdiv(positions, block_s), slots)
    return Cut(block_s, block_c, columns, dealt, work * columns * dealt)


def _dense_block(extent: int, wanted: int) -> int:
    """A power of two near `wanted` that leaves little of its last block empty."""
    options = [min(b, triton.next_power_of_2(extent)) for b in (wanted, wanted * 2, wanted // 2, wanted // 4)]
    fewest = min(triton.cdiv(extent, b) * b for b in options[:1] + options[2:])
    return next(b for b in options if triton.cdiv(extent, b) * b <= 1.1 * fewest)


def parts(work: int, blocks: int, slots: int) -> int:
    """Programs for the `blocks` of each of `work` pieces, so that the last of them ends soonest on `slots` places."""
    most = min(blocks, triton.cdiv(_ROUNDS * slots, work))
    return min(range(1, most + 1), key=lambda p: (triton.cdiv(work * p, slots) * (triton.cdiv(blocks, p) + _START), p))


def shape_class(x: torch.Tensor, channels_last: bool) -> str:
    """What a launch configuration depends on: the size of an element, the format, and whether the caches hold x."""
    size = x.numel() * x.element_size()
    held = "cached" if size <= 2**25 else "streamed"
    return f"{x.element_size()}byte-{'channels_last' if channels_last else 'contiguous'}-{held}"


def stages(configuration: launch.Configuration) -> dict[str, int]:
    """The launch's options; a loop without a dot is pipelined only where it is told its stages itself."""
    return {"num_warps": configuration["num_warps"], "STAGES": configuration["num_stages"]}


def shipped(programs: int, num_stages: int) -> launch.Configuration:
    """`programs` of tiles of 4,096 elements on a multiprocessor: what the kernel's registers leave room for."""
    return {"BLOCK": 4096, "SEGMENT": 128, "PROGRAMS": programs, "num_warps": 8, "num_stages": num_stages}


def candidates(channels_last: bool) -> Sequence[launch.Configuration]:
    """Launch configurations worth a try for a pass that streams."""
    segments = (128, 256) if channels_last else (128,)
    return [
        {"BLOCK": block, "SEGMENT": segment, "PROGRAMS": programs, "num_warps": warps, "num_stages": stages}
        for block, programs, warps, stages in (
            (2048, 4, 4, 3), (4096, 2, 8, 3), (4096, 2, 8, 4), (4096, 3, 8, 3), (4096, 4, 8, 2), (8192, 2, 16, 3),
        )
        for segment in segments
    ]  # fmt: skip


@triton.jit
def affine(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_scale_b, stride_scale_c, stride_scale_t, stride_shift_b,
    stride_shift_c, stride_shift_t, sample, frame, c, mask,
):  # fmt: skip
    """(gain, offset), float32, at channels c and frames `frame` (of mask's shape together): z = xhat gain + offset."""
    gain = tl.where(mask, 1.0, 0.0)
    offset = tl.zeros(mask.shape, tl.float32)
    if weight_ptr is not None:
        gain = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        offset = tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        factor = 1.0 + load_spread(scale_ptr, stride_scale_b, stride_scale_c, stride_scale_t, sample, frame, c, mask)
        gain *= factor
        offset *= factor
    if shift_ptr is not None:
        offset += load_spread(shift_ptr, stride_shift_b, stride_shift_c, stride_shift_t, sample, frame, c, mask)
    return gain, offset


@triton.jit
def load_spread(ptr, stride_b, stride_c, stride_t, sample, frame, c, mask):
    """A (B, C[, frames]) parameter at channels c and frames `frame`, float32."""
    at = sample * stride_b + c.to(tl.int64) * stride_c + frame * stride_t
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def quotient(a, b):
    """a / b in two instructions, right to 2 ulp; 0 for b from 2^126 on, where only exp's overflow leads."""
    if _INTERPRETED:
        return a / b
    return libdevice.fast_dividef(a, b)


@triton.jit
def one_plus_exp(z):
    """1 + exp(-z): silu is z over it, and the sigmoid 1 over it. Below -88 it is inf, and they are 0."""
    return 1.0 + tl.exp2(z * -1.4426950408889634)


@triton.jit
def through_silu(dy, z, SILU: tl.constexpr):
    """dy times silu's derivative at z."""
    if SILU:
        sigmoid = quotient(1.0, one_plus_exp(z))
        dy = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dy
