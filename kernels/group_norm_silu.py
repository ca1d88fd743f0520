"""GroupNorm, modulation and SiLU: the large tensors' two passes, and which tensors take one instead.

**Computes** y = silu((x - mean) rstd w (1 + scale) + b (1 + scale) + shift), mean and rstd of each sample's groups.
**Layout** x and y as rows (kernels/channel_rows.py): channels_last or contiguous, any batch and row strides; a copy
where the spatial dimensions do not walk memory as one. scale and shift any strides, frame by frame or not.
**Work split** both passes: a program owns a column of channels and every parts-th block of its rows. channels_last
columns are 128-byte lines of every row, whatever groups they meet; contiguous ones are a channel or a few. So many
programs as run at once, at batch 1 too, whatever the number of groups. The statistics pass leaves partial moments,
which each program of the second pass pools for its own column's groups, always in the same order: no third launch.
**Traffic** 3T, T being the bytes of x (2T with the statistics given), less what is still in the L2 cache when the
second pass starts where the first ended. Partial moments: 12 bytes for each program and group, read once by each
program of the same column. 2T where one program holds its groups (kernels/group_norm_silu_whole.py).
**Precision** float32; Welford's update in every element of the tile, then Chan's merge, centred throughout.
**Refuses** float64.

Found with ptxas (sm_90, bf16, 8 warps, tiles of 4,096 elements): 8.4 instructions an element in the statistics loop and
13.1 in the result's, of the 13.8 and 27.6 that the memory leaves time for. exp and a division as Triton writes them are
15 instructions, here 7. Two programs a multiprocessor: 98 and 96 registers, no spills, 24 kB of shared memory each.
On an H100: 92 to 94 % of a copy's rate from 50 MB on, forward and backward, in both formats; of 15 MB (45x80 positions)
80 to 86 %, where starting and pooling show. The statistics pass runs at 94 %, the result's at 91 %.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import launch
from .channel_rows import Rows, is_channels_last, position_offset, rows_inside, rows_of, tile_offsets
from .group_moments import (
    items_of,
    membership,
    pool_partials,
    pool_rows,
    shares_of,
    slots_of,
    store_partials,
    to_channels,
    to_slots,
)
from .group_norm_silu_backward import backward
from .group_norm_silu_terms import (
    STRIDES,
    Affine,
    Sizes,
    affine,
    affine_of,
    candidates,
    cut,
    one_plus_exp,
    quotient,
    shape_class,
    shipped,
    sizes_of,
    stages,
)
from .group_norm_silu_whole import FORWARD_MOST, whole
from .group_norm_silu_whole import forward as whole_forward

__all__ = ["backward", "forward"]

_Optional = torch.Tensor | None
_SHIPPED = shipped(programs=2, num_stages=4)


@triton.jit(do_not_specialize=["plane", "stride_xb", "stride_xr", "columns", "parts"])
def group_norm_silu_stats_kernel(
    x_ptr, partials_ptr, plane, stride_xb, stride_xr, channels, positions, WIDTH, columns, parts,
    C_UNIT: tl.constexpr, S_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr, SLOTS: tl.constexpr, SHARES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and centred sum of squares of a column's groups over every parts-th block of rows."""
    pid = tl.program_id(0)
    column = pid % columns
    part = pid // columns % parts
    sample = (pid // columns // parts).to(tl.int64)
    C = channels * C_UNIT
    S = tl.cast(positions, tl.int64) * S_UNIT
    c0 = column * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_S)
    at = tile_offsets(rows, c, stride_xr, C_UNIT * S_UNIT, CHANNELS_LAST)
    x_ptr += sample * stride_xb * (C_UNIT * S_UNIT)
    mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    seen = 0.0
    full = S // BLOCK_S
    channel_inside = (c < C)[None, :]
    # Welford's update in every element of the tile: no shift to choose, so no outlier to choose it wrong.
    for block in tl.range(part, full, parts, num_stages=STAGES):
        to = position_offset(tl.cast(block, tl.int64) * BLOCK_S, stride_xr, C_UNIT * S_UNIT, CHANNELS_LAST)
        x = tl.load(x_ptr + to + at, mask=channel_inside, other=0.0).to(tl.float32)
        seen += 1.0
        apart = x - mean
        mean += apart * (1.0 / seen)
        m2 += apart * (x - mean)
    counts = tl.zeros([BLOCK_S], tl.float32) + seen
    if (full * BLOCK_S < S) & (full % parts == part):
        row_inside = rows < (S - full * BLOCK_S).to(tl.int32)
        inside = channel_inside & row_inside[:, None]
        to = position_offset(full * BLOCK_S, stride_xr, C_UNIT * S_UNIT, CHANNELS_LAST)
        x = tl.load(x_ptr + to + at, mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(inside, x - mean, 0.0)
        mean += apart * (1.0 / (seen + 1.0))
        m2 += apart * (x - mean)
        counts += tl.where(row_inside, 1.0, 0.0)
    mean, m2, n = pool_rows(mean, m2, counts)
    mean, m2, n = to_slots(mean, m2, tl.where(c < C, n, 0.0), membership(c0, tl.arange(0, BLOCK_C), WIDTH, SLOTS))
    store_partials(partials_ptr, plane, mean, m2, n, sample, column, part, parts, C, WIDTH, BLOCK_C, SLOTS, SHARES)


@triton.jit(do_not_specialize=["stride_xb", "stride_xr", "stride_yb", "stride_yr", "frames", "columns", "parts",
                               "plane", "stats_parts", *STRIDES])  # fmt: skip
def group_norm_silu_fwd_kernel(
    x_ptr, y_ptr, moments_ptr, partials_ptr, plane, stats_parts, stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    stride_scale_b, stride_scale_c, stride_scale_t, stride_shift_b, stride_shift_c, stride_shift_t,
    stride_xb, stride_xr, stride_yb, stride_yr, channels, positions, frames, WIDTH, columns, parts,
    eps, SILU: tl.constexpr,
    C_UNIT: tl.constexpr, S_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr, SLOTS: tl.constexpr, STATS_BLOCK_C: tl.constexpr, STATS_SHARES: tl.constexpr,
    ITEMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The result of a column over every parts-th block of a frame's rows, from the end of x to its start."""
    pid = tl.program_id(0)
    column = pid % columns
    part = pid // columns % parts
    # What the statistics pass read last is still in the caches: samples, frames and blocks go backwards.
    stretch = (tl.num_programs(0) - 1 - pid) // columns // parts
    sample = (stretch // frames).to(tl.int64)
    frame = (stretch % frames).to(tl.int64)
    C = channels * C_UNIT
    S = tl.cast(positions, tl.int64) * S_UNIT
    c0 = column * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    group = c0 // WIDTH + tl.arange(0, SLOTS)
    groups = C // WIDTH
    if stats_ptr is not None:
        at = (sample * groups + group) * 2
        mean = tl.load(stats_ptr + at, mask=group < groups, other=0.0).to(tl.float32)
        m2 = tl.load(stats_ptr + at + 1, mask=group < groups, other=0.0).to(tl.float32)
        n = tl.full([SLOTS], 0.0, tl.float32) + (S * frames).to(tl.float32) * WIDTH
    else:
        mean, m2, n = pool_partials(
            partials_ptr, plane, sample, c0, C, WIDTH, stats_parts, STATS_BLOCK_C, STATS_SHARES, SLOTS, ITEMS
        )  # fmt: skip
    rstd = 1.0 / tl.sqrt_rn(m2 / tl.maximum(n, 1.0) + eps)
    if (part == 0) & (frame == 0):
        at = (sample * groups + group) * 2
        # Of a group that several columns share, the one with its first channel writes.
        mine = (group < groups) & (group * WIDTH >= c0) & (group * WIDTH < c0 + BLOCK_C)
        tl.store(moments_ptr + at, mean, mask=mine)
        tl.store(moments_ptr + at + 1, rstd, mask=mine)
    member = membership(c0, tl.arange(0, BLOCK_C), WIDTH, SLOTS)
    gain, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_scale_b, stride_scale_c, stride_scale_t, stride_shift_b,
        stride_shift_c, stride_shift_t, sample, frame, c, c < C,
    )  # fmt: skip
    centre = to_channels(mean, member)[None, :]
    slope = (gain * to_channels(rstd, member))[None, :]
    x_ptr += sample * stride_xb * (C_UNIT * S_UNIT)
    y_ptr += sample * stride_yb * (C_UNIT * S_UNIT)
    rows = tl.arange(0, BLOCK_S)
    x_at = tile_offsets(rows, c, stride_xr, C_UNIT * S_UNIT, CHANNELS_LAST)
    y_at = tile_offsets(rows, c, stride_yr, C_UNIT * S_UNIT, CHANNELS_LAST)
    blocks = tl.cdiv(S, BLOCK_S)
    for turn in tl.range(part, blocks, parts, num_stages=STAGES):
        first = (blocks - 1 - turn) * BLOCK_S
        inside = rows_inside(rows, first, S, BLOCK_S)[:, None] & (c < C)[None, :]
        first += frame * S
        to = position_offset(first, stride_xr, C_UNIT * S_UNIT, CHANNELS_LAST)
        x = tl.load(x_ptr + to + x_at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        z = (x - centre) * slope + offset[None, :]
        if SILU:
            z = quotient(z, one_plus_exp(z))
        to = position_offset(first, stride_yr, C_UNIT * S_UNIT, CHANNELS_LAST)
        tl.store(y_ptr + to + y_at, launch.narrow(z, y_ptr.dtype.element_ty), mask=inside)


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
    x_rows, y_rows = rows_of(x, channels_last), rows_of(y, channels_last)
    parameters = affine_of(weight, bias, scale, shift)
    sizes = sizes_of(channels_last, num_groups, parameters.frames, x_rows, y_rows)
    tile = whole(x, sizes, FORWARD_MOST) if stats is None else None
    call = (x_rows, y_rows, moments, parameters, eps, silu)
    with launch.on_device(x):
        _two_passes(sizes, *call, stats) if tile is None else whole_forward(tile, *call)
    return (y if y_rows.tensor is y else y.copy_(y_rows.tensor)), moments


def _two_passes(
    sizes: Sizes, x: Rows, y: Rows, moments: torch.Tensor, parameters: Affine, eps: float, silu: bool, stats: _Optional,
) -> None:  # fmt: skip
    """Statistics, unless they are given, then the result."""
    kind = shape_class(x.tensor, sizes.channels_last)
    options = functools.partial(candidates, sizes.channels_last)
    used = launch.configuration("group_norm_silu_stats", kind, _SHIPPED, options)
    read = cut(x.tensor, sizes, False, used)
    shared = {"C_UNIT": sizes.units[0], "S_UNIT": sizes.units[1], "CHANNELS_LAST": sizes.channels_last}
    partials, shares = None, shares_of(read.block_c, sizes.width)
    plane = sizes.batch * sizes.groups * shares * read.parts
    channels, positions = sizes.extents()
    if stats is None:
        partials = torch.empty((3, plane), dtype=torch.float32, device=moments.device)
        group_norm_silu_stats_kernel[(read.programs,)](
            x.tensor, partials, plane, *sizes.strides(x), channels, positions * sizes.frames, sizes.width, read.columns,
            read.parts, SLOTS=slots_of(read.block_c, sizes.width, sizes.groups), SHARES=shares, **shared,
            **read.constants(), **stages(used),
        )  # fmt: skip
    used = launch.configuration("group_norm_silu_fwd", kind, _SHIPPED, options)
    written = cut(x.tensor, sizes, True, used)
    slots = slots_of(written.block_c, sizes.width, sizes.groups)
    group_norm_silu_fwd_kernel[(written.programs,)](
        x.tensor, y.tensor, moments, partials, plane, read.parts, None if stats is None else stats.contiguous(),
        *parameters.arguments(), *sizes.strides(x, y), channels, positions, sizes.frames, sizes.width, written.columns,
        written.parts, eps, SILU=silu, SLOTS=slots, STATS_BLOCK_C=read.block_c, STATS_SHARES=shares,
        ITEMS=items_of(slots, shares * read.parts), **shared, **written.constants(), **stages(used),
    )  # fmt: skip
