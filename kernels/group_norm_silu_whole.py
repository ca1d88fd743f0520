"""group_norm_silu and its gradients where one program holds all that it normalises: one launch, every value read once.

**Computes** what kernels/group_norm_silu.py does, for groups of at most 16,384 values, forward, and 8,192, backward
(rounded up to powers of two; backward with scale and shift per sample).
**Layout** both memory formats, any batch and row strides.
**Work split** a program owns a few whole groups of a sample: so many that its rows have 64 bytes where they fit, and
that the grid is not far larger than the device. Calls whose rows would stay under 32 bytes are left to the two passes.
**Traffic** 2T forward, 3T backward, T being the bytes of x; with (B, C, 2) float32 where weight or bias has a gradient.
**Precision** float32; the mean first, then the centred squares, from registers.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .channel_rows import Rows, tile_offsets
from .group_moments import membership, pool_rows, to_channels, to_slots
from .group_norm_silu_terms import STRIDES, Affine, Sizes, affine, one_plus_exp, quotient, through_silu

_Optional = torch.Tensor | None
FORWARD_MOST = 16384
BACKWARD_MOST = 8192  # two tiles, x and dy, are live at once
_GROWN = 4096  # up to this tile groups share a program where programs are plenty
_ROW_BYTES = 64  # groups share a program until its rows have so many bytes: half a line, what DRAM moves
_LEAST_ROW_BYTES = 32  # with less than a sector in a row, two passes over whole lines move less
_SAMPLES = 16  # samples whose shares of a parameter's gradient are added at a time


class Whole(NamedTuple):
    """The tile of a program: all positions of `groups` groups. In `sizes`, a column is a multiple of the unit too."""

    sizes: Sizes
    block_s: int
    block_c: int
    groups: int
    slots: int

    def programs(self) -> int:
        """The grid."""
        return self.sizes.batch * triton.cdiv(self.sizes.groups, self.groups)

    def constants(self) -> dict[str, int | bool]:
        """As the kernels take it."""
        c_unit, s_unit = self.sizes.units
        return {
            "BLOCK_S": self.block_s, "BLOCK_C": self.block_c, "SLOTS": self.slots, "C_UNIT": c_unit, "S_UNIT": s_unit,
            "CHANNELS_LAST": self.sizes.channels_last,
        }  # fmt: skip

    def column(self) -> int:
        """Channels of a program, in units."""
        return self.groups * self.sizes.width // self.sizes.units[0]


def whole(x: torch.Tensor, sizes: Sizes, most: int) -> Whole | None:
    """The tile, None where a group is larger than `most` values."""
    return _whole(sizes, most, x.element_size(), launch.multiprocessors(x))


@functools.lru_cache(maxsize=4096)
def _whole(sizes: Sizes, most: int, element_size: int, multiprocessors: int) -> Whole | None:
    block_s = triton.next_power_of_2(sizes.positions * sizes.frames)

    def tile(groups: int) -> int:
        return block_s * triton.next_power_of_2(groups * sizes.width)

    def row(groups: int) -> int:
        return groups * sizes.width * element_size if sizes.channels_last else _ROW_BYTES

    groups = 1
    if tile(groups) > most:
        return None
    while groups < sizes.groups:
        crowded = sizes.batch * triton.cdiv(sizes.groups, groups) > 4 * multiprocessors
        if tile(groups * 2) > (most if row(groups) < _ROW_BYTES else _GROWN if crowded else 0):
            break
        groups *= 2
    groups = min(groups, sizes.groups)
    if groups < sizes.groups and row(groups) < _LEAST_ROW_BYTES:
        return None
    if sizes.channels_last:
        sizes = sizes._replace(unit=math.gcd(sizes.unit, groups * sizes.width))
    block_c = triton.next_power_of_2(groups * sizes.width)
    return Whole(sizes, block_s, block_c, groups, triton.next_power_of_2(groups))


def _configuration(kernel: str, tile: Whole, x: torch.Tensor) -> launch.Configuration:
    """32 values of the tile for each thread, so that they and what is derived stay in registers."""
    elements = tile.block_s * tile.block_c
    shipped = {"num_warps": max(1, min(16, elements // 1024)), "num_stages": 1}
    kind = f"{x.element_size()}byte-{elements}"
    return launch.configuration(kernel, kind, shipped, lambda: [{**shipped, "num_warps": w} for w in (1, 2, 4, 8, 16)])


@triton.jit(do_not_specialize=["stride_xb", "stride_xr", "stride_yb", "stride_yr", "frames", "column",
                               *STRIDES])  # fmt: skip
def group_norm_silu_whole_fwd_kernel(
    x_ptr, y_ptr, moments_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    stride_scale_b, stride_scale_c, stride_scale_t, stride_shift_b, stride_shift_c, stride_shift_t,
    stride_xb, stride_xr, stride_yb, stride_yr, channels, positions, frames, column, WIDTH, eps, SILU: tl.constexpr,
    PER_FRAME: tl.constexpr, C_UNIT: tl.constexpr, S_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Some groups of a sample: moments, result."""
    C, S = channels * C_UNIT, positions * S_UNIT * frames
    groups = C // WIDTH
    columns = tl.cdiv(channels, column)
    sample = (tl.program_id(0) // columns).to(tl.int64)
    c0 = tl.program_id(0) % columns * column * C_UNIT
    lane = tl.arange(0, BLOCK_C)
    c = c0 + lane
    mine = lane < tl.minimum(channels - tl.program_id(0) % columns * column, column) * C_UNIT
    rows = tl.arange(0, BLOCK_S)
    inside = (rows < S)[:, None] & mine[None, :]
    at = tile_offsets(rows, c, stride_xr, C_UNIT * S_UNIT, CHANNELS_LAST)
    x = tl.load(x_ptr + sample * stride_xb * (C_UNIT * S_UNIT) + at, mask=inside, other=0.0).to(tl.float32)
    member = membership(c0, lane, WIDTH, SLOTS)
    mean, m2, n = pool_rows(x, tl.zeros_like(x), tl.where(rows < S, 1.0, 0.0))
    mean, m2, n = to_slots(mean, m2, tl.where(mine, n, 0.0), member)
    rstd = 1.0 / tl.sqrt_rn(m2 / tl.maximum(n, 1.0) + eps)
    slot = tl.arange(0, SLOTS)
    at = (sample * groups + c0 // WIDTH + slot) * 2
    found = slot * WIDTH < tl.minimum(C - c0, column * C_UNIT)
    tl.store(moments_ptr + at, mean, mask=found)
    tl.store(moments_ptr + at + 1, rstd, mask=found)
    frame = (rows // (positions * S_UNIT)).to(tl.int64)[:, None] if PER_FRAME else tl.zeros([1, 1], tl.int64)
    gain, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_scale_b, stride_scale_c, stride_scale_t, stride_shift_b,
        stride_shift_c, stride_shift_t, sample, frame, c[None, :], inside if PER_FRAME else mine[None, :],
    )  # fmt: skip
    z = (x - to_channels(mean, member)[None, :]) * (to_channels(rstd, member)[None, :] * gain) + offset
    if SILU:
        z = quotient(z, one_plus_exp(z))
    at = tile_offsets(rows, c, stride_yr, C_UNIT * S_UNIT, CHANNELS_LAST)
    y_ptr += sample * stride_yb * (C_UNIT * S_UNIT)
    tl.store(y_ptr + at, launch.narrow(z, y_ptr.dtype.element_ty), mask=inside)


def forward(tile: Whole, x: Rows, y: Rows, moments: torch.Tensor, parameters: Affine, eps: float, silu: bool) -> None:
    """Fill y and the moments."""
    sizes = tile.sizes
    used = _configuration("group_norm_silu_whole_fwd", tile, x.tensor)
    group_norm_silu_whole_fwd_kernel[(tile.programs(),)](
        x.tensor, y.tensor, moments, *parameters.arguments(), *sizes.strides(x, y), *sizes.extents(), sizes.frames,
        tile.column(), sizes.width, eps, SILU=silu, PER_FRAME=sizes.frames > 1, **tile.constants(), **used,
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride_xb", "stride_xr", "stride_db", "stride_dr", "stride_gb", "stride_gr", "column",
                               *STRIDES])  # fmt: skip
def group_norm_silu_whole_bwd_kernel(
    x_ptr, dy_ptr, dx_ptr, moments_ptr, shares_ptr, dscale_ptr, dshift_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    stride_scale_b, stride_scale_c, stride_scale_t, stride_shift_b, stride_shift_c, stride_shift_t,
    stride_xb, stride_xr, stride_db, stride_dr, stride_gb, stride_gr, channels, positions, column, WIDTH,
    SILU: tl.constexpr, C_UNIT: tl.constexpr, S_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Some groups of a sample: dx, dscale, dshift, and the sample's share of dweight and dbias."""
    C, S = channels * C_UNIT, positions * S_UNIT
    columns = tl.cdiv(channels, column)
    sample = (tl.program_id(0) // columns).to(tl.int64)
    c0 = tl.program_id(0) % columns * column * C_UNIT
    lane = tl.arange(0, BLOCK_C)
    c = c0 + lane
    mine = lane < tl.minimum(channels - tl.program_id(0) % columns * column, column) * C_UNIT
    rows = tl.arange(0, BLOCK_S)
    inside = (rows < S)[:, None] & mine[None, :]
    at = tile_offsets(rows, c, stride_xr, C_UNIT * S_UNIT, CHANNELS_LAST)
    x = tl.load(x_ptr + sample * stride_xb * (C_UNIT * S_UNIT) + at, mask=inside, other=0.0).to(tl.float32)
    at = tile_offsets(rows, c, stride_dr, C_UNIT * S_UNIT, CHANNELS_LAST)
    dy = tl.load(dy_ptr + sample * stride_db * (C_UNIT * S_UNIT) + at, mask=inside, other=0.0).to(tl.float32)
    at = (sample * (C // WIDTH) + c // WIDTH) * 2
    centre = tl.load(moments_ptr + at, mask=mine, other=0.0)
    rstd = tl.load(moments_ptr + at + 1, mask=mine, other=0.0)
    gain, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_scale_b, stride_scale_c, stride_scale_t, stride_shift_b,
        stride_shift_c, stride_shift_t, sample, 0, c, mine,
    )  # fmt: skip
    apart = x - centre[None, :]
    slope = rstd * gain
    dz = through_silu(dy, apart * slope[None, :] + offset[None, :], SILU)
    sum_dz = tl.sum(dz, 0)
    sum_dz_xhat = tl.sum(dz * apart, 0) * rstd
    member = membership(c0, lane, WIDTH, SLOTS) & mine[:, None]
    n = S * WIDTH
    level = tl.sum(tl.where(member, (gain * sum_dz)[:, None], 0.0), 0) / n
    tilt = tl.sum(tl.where(member, (gain * sum_dz_xhat)[:, None], 0.0), 0) / n
    level, tilt = rstd * to_channels(level, member), rstd * rstd * to_channels(tilt, member)
    dx = dz * slope[None, :] - (apart * tilt[None, :] + level[None, :])
    at = tile_offsets(rows, c, stride_gr, C_UNIT * S_UNIT, CHANNELS_LAST)
    dx_ptr += sample * stride_gb * (C_UNIT * S_UNIT)
    tl.store(dx_ptr + at, launch.narrow(dx, dx_ptr.dtype.element_ty), mask=inside)
    factor = tl.where(mine, 1.0, 0.0)
    at = sample * C + c
    if scale_ptr is not None:
        own, own_offset = affine(weight_ptr, bias_ptr, None, None, 0, 0, 0, 0, 0, 0, sample, 0, c, mine)
        dscale = own * sum_dz_xhat + own_offset * sum_dz
        tl.store(dscale_ptr + at, launch.narrow(dscale, dscale_ptr.dtype.element_ty), mask=mine)
        factor, _ = affine(None, None, scale_ptr, None, stride_scale_b, stride_scale_c, 0, 0, 0, 0, sample, 0, c, mine)
    if shift_ptr is not None:
        tl.store(dshift_ptr + at, launch.narrow(sum_dz, dshift_ptr.dtype.element_ty), mask=mine)
    tl.store(shares_ptr + at * 2, factor * sum_dz_xhat, mask=mine)
    tl.store(shares_ptr + at * 2 + 1, factor * sum_dz, mask=mine)


@triton.jit
def parameter_gradients(shares_ptr, dweight_ptr, dbias_ptr, batch, c, C, SAMPLES: tl.constexpr):
    """dweight and dbias at channels c: every sample's share, added in the order of the samples."""
    dweight = tl.zeros(c.shape, tl.float32)
    dbias = tl.zeros(c.shape, tl.float32)
    for first in range(0, batch, SAMPLES):
        sample = (first + tl.arange(0, SAMPLES))[:, None]
        found = (sample < batch) & (c < C)[None, :]
        at = (sample.to(tl.int64) * C + c[None, :]) * 2
        dweight += tl.sum(tl.load(shares_ptr + at, mask=found, other=0.0), 0)
        dbias += tl.sum(tl.load(shares_ptr + at + 1, mask=found, other=0.0), 0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, launch.narrow(dweight, dweight_ptr.dtype.element_ty), mask=c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, launch.narrow(dbias, dbias_ptr.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["batch", "C"])
def group_norm_silu_bwd_parameters_kernel(
    shares_ptr, dweight_ptr, dbias_ptr, batch, C, BLOCK_C: tl.constexpr, SAMPLES: tl.constexpr
):
    """`parameter_gradients` of a column."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    parameter_gradients(shares_ptr, dweight_ptr, dbias_ptr, batch, c, C, SAMPLES)


@functools.lru_cache(maxsize=1024)
def samples_at_once(batch: int) -> int:
    """SAMPLES of `parameter_gradients`."""
    return min(_SAMPLES, triton.next_power_of_2(batch))


def backward(
    tile: Whole, x: Rows, dy: Rows, dx: Rows, moments: torch.Tensor, parameters: Affine,
    grads: list[_Optional], silu: bool,
) -> None:  # fmt: skip
    """Fill dx and `grads`, those of weight, bias, scale and shift that are not None."""
    sizes = tile.sizes
    dweight, dbias, dscale, dshift = grads
    shares = x.tensor.new_empty((sizes.batch, sizes.channels, 2), dtype=torch.float32)
    used = _configuration("group_norm_silu_whole_bwd", tile, x.tensor)
    group_norm_silu_whole_bwd_kernel[(tile.programs(),)](
        x.tensor, dy.tensor, dx.tensor, moments, shares, dscale, dshift, *parameters.arguments(),
        *sizes.strides(x, dy, dx), *sizes.extents(), tile.column(), sizes.width, SILU=silu, **tile.constants(), **used,
    )  # fmt: skip
    if dweight is not None or dbias is not None:
        block_c = min(128, triton.next_power_of_2(sizes.channels))
        group_norm_silu_bwd_parameters_kernel[(triton.cdiv(sizes.channels, block_c),)](
            shares, dweight, dbias, sizes.batch, sizes.channels, BLOCK_C=block_c,
            SAMPLES=samples_at_once(sizes.batch), num_warps=4,
        )  # fmt: skip
