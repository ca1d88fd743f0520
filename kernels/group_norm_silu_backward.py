"""The gradients of group_norm_silu: sums, what they mean for each group and parameter, then dx.

**Computes** with xhat = (x - mean) rstd, gain = w (1 + scale), offset = b (1 + scale) + shift and
dz = dy silu'(xhat gain + offset), computed from x again: for each channel (and frame) the sums of dz and dz xhat, which
are dshift and, with w and b, dscale, dweight and dbias; for each group the means m of dz gain and n of dz gain xhat;
dx = rstd (dz gain - m - xhat n).
**Layout** as forward (kernels/group_norm_silu.py), each of x, dy and dx with its own strides.
**Work split** passes over x and dy as forward's, a program's rows within one frame; between them a program for each
group of each sample. dweight and dbias are added over the samples by a few more programs of the last launch.
**Traffic** 5T, T being the bytes of x: x and dy read twice, dx written; less what is still in the L2 cache, as forward.
Sums: 8 bytes for each program of the first pass and each of its channels. 3T where one program holds its groups.
**Precision** float32, every sum in the same order; gradients rounded once, to their parameter's dtype.
**Refuses** float64.

Found with ptxas (sm_90, bf16, 8 warps, tiles of 4,096 elements): 20 instructions an element in the first pass and 23 in
the second, of the 27.6 and 41 that the memory leaves time for; 128 and 80 registers, so two and three programs a
multiprocessor, no spills, 32 kB of shared memory each (sm_80, sm_100: the same).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import launch
from .channel_rows import Rows, is_channels_last, position_offset, rows_inside, rows_of, tile_offsets
from .group_norm_silu_terms import (
    STRIDES,
    Affine,
    Cut,
    Sizes,
    affine,
    affine_of,
    candidates,
    cut,
    load_spread,
    shape_class,
    shipped,
    sizes_of,
    stages,
    through_silu,
)
from .group_norm_silu_whole import BACKWARD_MOST, parameter_gradients, samples_at_once, whole
from .group_norm_silu_whole import backward as whole_backward

_Optional = torch.Tensor | None
_SHIPPED_SUMS = shipped(programs=2, num_stages=3)
# float32 takes up to 90 registers and twice the shared memory: two programs.
_SHIPPED = {2: shipped(programs=3, num_stages=3), 4: shipped(programs=2, num_stages=3)}  # by bytes of an element
_SUMS_TILE = 512  # elements of a tile of partial sums


@triton.jit(do_not_specialize=["stride_xb", "stride_xr", "stride_db", "stride_dr", "frames", "columns", "parts",
                               *STRIDES])  # fmt: skip
def group_norm_silu_bwd_sums_kernel(
    x_ptr, dy_ptr, moments_ptr, sums_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    stride_scale_b, stride_scale_c, stride_scale_t, stride_shift_b, stride_shift_c, stride_shift_t,
    stride_xb, stride_xr, stride_db, stride_dr, channels, positions, frames, WIDTH, columns, parts,
    SILU: tl.constexpr, C_UNIT: tl.constexpr, S_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(sum of dz, sum of dz xhat) of each channel of a column over every parts-th block of a frame's rows."""
    pid = tl.program_id(0)
    column = pid % columns
    part = pid // columns % parts
    stretch = (pid // columns // parts).to(tl.int64)
    sample = stretch // frames
    frame = stretch % frames
    C = channels * C_UNIT
    S = tl.cast(positions, tl.int64) * S_UNIT
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    at = (sample * (C // WIDTH) + c // WIDTH) * 2
    centre = tl.load(moments_ptr + at, mask=c < C, other=0.0)[None, :]
    rstd = tl.load(moments_ptr + at + 1, mask=c < C, other=0.0)
    gain, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_scale_b, stride_scale_c, stride_scale_t, stride_shift_b,
        stride_shift_c, stride_shift_t, sample, frame, c, c < C,
    )  # fmt: skip
    slope = (rstd * gain)[None, :]
    x_ptr += sample * stride_xb * (C_UNIT * S_UNIT)
    dy_ptr += sample * stride_db * (C_UNIT * S_UNIT)
    rows = tl.arange(0, BLOCK_S)
    x_at = tile_offsets(rows, c, stride_xr, C_UNIT * S_UNIT, CHANNELS_LAST)
    dy_at = tile_offsets(rows, c, stride_dr, C_UNIT * S_UNIT, CHANNELS_LAST)
    sum_dz = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    sum_dz_apart = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for block in tl.range(part, tl.cdiv(S, BLOCK_S), parts, num_stages=STAGES):
        first = tl.cast(block, tl.int64) * BLOCK_S
        inside = rows_inside(rows, first, S, BLOCK_S)[:, None] & (c < C)[None, :]
        first += frame * S
        to = position_offset(first, stride_xr, C_UNIT * S_UNIT, CHANNELS_LAST)
        x = tl.load(x_ptr + to + x_at, mask=inside, other=0.0).to(tl.float32)
        to = position_offset(first, stride_dr, C_UNIT * S_UNIT, CHANNELS_LAST)
        dy = tl.load(dy_ptr + to + dy_at, mask=inside, other=0.0).to(tl.float32)  # 0: adds nothing
        apart = x - centre
        dz = through_silu(dy, apart * slope + offset[None, :], SILU)
        sum_dz += dz
        sum_dz_apart += dz * apart
    at = ((stretch * parts + part) * C + c) * 2
    tl.store(sums_ptr + at, tl.sum(sum_dz, 0), mask=c < C)
    tl.store(sums_ptr + at + 1, tl.sum(sum_dz_apart, 0) * rstd, mask=c < C)


@triton.jit(do_not_specialize=["parts", "frames", *STRIDES])
def group_norm_silu_bwd_groups_kernel(
    sums_ptr, means_ptr, shares_ptr, dscale_ptr, dshift_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    stride_scale_b, stride_scale_c, stride_scale_t, stride_shift_b, stride_shift_c, stride_shift_t,
    channels, positions, frames, WIDTH, parts, SCALE_PER_FRAME: tl.constexpr, SHIFT_PER_FRAME: tl.constexpr,
    C_UNIT: tl.constexpr, S_UNIT: tl.constexpr, FRAMES: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of one group of one sample: the two means that dx needs, the gradients of scale and shift, shares of the rest.

    means (B, G, 2): of dz gain and of dz gain xhat. shares (B, C, 2): the sample's part of dweight and of dbias.
    """
    C = channels * C_UNIT
    groups = C // WIDTH
    sample = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    lane = tl.arange(0, BLOCK_C)
    c = group * WIDTH + lane
    mine = lane < WIDTH
    sum_gain = tl.zeros([BLOCK_C], tl.float32)
    sum_gain_xhat = tl.zeros([BLOCK_C], tl.float32)
    dweight = tl.zeros([BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_C], tl.float32)
    dscale = tl.zeros([BLOCK_C], tl.float32)
    dshift = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, frames, FRAMES):
        frame = first + tl.arange(0, FRAMES)[:, None]
        inside = (frame < frames) & mine[None, :]
        sum_dz = tl.zeros([FRAMES, BLOCK_C], tl.float32)
        sum_dz_xhat = tl.zeros([FRAMES, BLOCK_C], tl.float32)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)[None, :, None]
            row = ((sample * frames + frame) * parts)[:, :, None] + part
            at = (row * C + c[None, None, :]) * 2
            found = inside[:, None, :] & (part < parts)
            sum_dz += tl.sum(tl.load(sums_ptr + at, mask=found, other=0.0), 1)
            sum_dz_xhat += tl.sum(tl.load(sums_ptr + at + 1, mask=found, other=0.0), 1)
        gain, _ = affine(
            weight_ptr, None, scale_ptr, None, stride_scale_b, stride_scale_c, stride_scale_t, 0, 0, 0,
            sample, frame, c[None, :], inside,
        )  # fmt: skip
        sum_gain += tl.sum(gain * sum_dz, 0)
        sum_gain_xhat += tl.sum(gain * sum_dz_xhat, 0)
        factor = tl.where(inside, 1.0, 0.0)
        if scale_ptr is not None:
            factor += load_spread(
                scale_ptr, stride_scale_b, stride_scale_c, stride_scale_t, sample, frame, c[None, :], inside
            )
            # scale multiplies what weight and bias leave of xhat.
            own, centre = affine(weight_ptr, bias_ptr, None, None, 0, 0, 0, 0, 0, 0, sample, frame, c[None, :], inside)
            of_scale = own * sum_dz_xhat + centre * sum_dz
            if SCALE_PER_FRAME:
                at = (sample * C + c[None, :]) * frames + frame
                tl.store(dscale_ptr + at, launch.narrow(of_scale, dscale_ptr.dtype.element_ty), mask=inside)
            dscale += tl.sum(of_scale, 0)
        if shift_ptr is not None:
            if SHIFT_PER_FRAME:
                at = (sample * C + c[None, :]) * frames + frame
                tl.store(dshift_ptr + at, launch.narrow(sum_dz, dshift_ptr.dtype.element_ty), mask=inside)
            dshift += tl.sum(sum_dz, 0)
        dweight += tl.sum(factor * sum_dz_xhat, 0)
        dbias += tl.sum(factor * sum_dz, 0)
    n = tl.cast(positions, tl.float32) * S_UNIT * frames * WIDTH
    at = (sample * groups + group) * 2
    tl.store(means_ptr + at, tl.sum(sum_gain, 0) / n)
    tl.store(means_ptr + at + 1, tl.sum(sum_gain_xhat, 0) / n)
    at = sample * C + c
    tl.store(shares_ptr + at * 2, dweight, mask=mine)
    tl.store(shares_ptr + at * 2 + 1, dbias, mask=mine)
    if scale_ptr is not None and not SCALE_PER_FRAME:
        tl.store(dscale_ptr + at, launch.narrow(dscale, dscale_ptr.dtype.element_ty), mask=mine)
    if shift_ptr is not None and not SHIFT_PER_FRAME:
        tl.store(dshift_ptr + at, launch.narrow(dshift, dshift_ptr.dtype.element_ty), mask=mine)


@triton.jit(do_not_specialize=["stride_xb", "stride_xr", "stride_db", "stride_dr", "stride_gb", "stride_gr", "batch",
                               "frames", "columns", "parts", *STRIDES])  # fmt: skip
def group_norm_silu_bwd_kernel(
    x_ptr, dy_ptr, dx_ptr, moments_ptr, means_ptr, shares_ptr, dweight_ptr, dbias_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    stride_scale_b, stride_scale_c, stride_scale_t, stride_shift_b, stride_shift_c, stride_shift_t,
    stride_xb, stride_xr, stride_db, stride_dr, stride_gb, stride_gr, batch, channels, positions, frames, WIDTH,
    columns, parts, SILU: tl.constexpr, C_UNIT: tl.constexpr, S_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, SAMPLES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of a column over every parts-th block of a frame's rows, from the end; a last few programs: dweight, dbias."""
    pid = tl.program_id(0)
    column = pid % columns
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    C = channels * C_UNIT
    programs = batch * frames * columns * parts
    if pid >= programs:
        parameter_gradients(shares_ptr, dweight_ptr, dbias_ptr, batch, c, C, SAMPLES)
    else:
        part = pid // columns % parts
        # What the first pass read last is still in the caches: samples, frames and blocks go backwards.
        stretch = ((programs - 1 - pid) // columns // parts).to(tl.int64)
        sample = stretch // frames
        frame = stretch % frames
        S = tl.cast(positions, tl.int64) * S_UNIT
        at = (sample * (C // WIDTH) + c // WIDTH) * 2
        centre = tl.load(moments_ptr + at, mask=c < C, other=0.0)[None, :]
        rstd = tl.load(moments_ptr + at + 1, mask=c < C, other=0.0)
        level = (rstd * tl.load(means_ptr + at, mask=c < C, other=0.0))[None, :]
        tilt = (rstd * rstd * tl.load(means_ptr + at + 1, mask=c < C, other=0.0))[None, :]
        gain, offset = affine(
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_scale_b, stride_scale_c, stride_scale_t, stride_shift_b,
            stride_shift_c, stride_shift_t, sample, frame, c, c < C,
        )  # fmt: skip
        slope = (rstd * gain)[None, :]
        x_ptr += sample * stride_xb * (C_UNIT * S_UNIT)
        dy_ptr += sample * stride_db * (C_UNIT * S_UNIT)
        dx_ptr += sample * stride_gb * (C_UNIT * S_UNIT)
        rows = tl.arange(0, BLOCK_S)
        x_at = tile_offsets(rows, c, stride_xr, C_UNIT * S_UNIT, CHANNELS_LAST)
        dy_at = tile_offsets(rows, c, stride_dr, C_UNIT * S_UNIT, CHANNELS_LAST)
        dx_at = tile_offsets(rows, c, stride_gr, C_UNIT * S_UNIT, CHANNELS_LAST)
        blocks = tl.cdiv(S, BLOCK_S)
        for turn in tl.range(part, blocks, parts, num_stages=STAGES):
            first = (blocks - 1 - turn) * BLOCK_S
            inside = rows_inside(rows, first, S, BLOCK_S)[:, None] & (c < C)[None, :]
            first += frame * S
            to = position_offset(first, stride_xr, C_UNIT * S_UNIT, CHANNELS_LAST)
            x = tl.load(x_ptr + to + x_at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            to = position_offset(first, stride_dr, C_UNIT * S_UNIT, CHANNELS_LAST)
            dy = tl.load(dy_ptr + to + dy_at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            apart = x - centre
            dz = through_silu(dy, apart * slope + offset[None, :], SILU)
            dx = dz * slope - (apart * tilt + level)
            to = position_offset(first, stride_gr, C_UNIT * S_UNIT, CHANNELS_LAST)
            tl.store(dx_ptr + to + dx_at, launch.narrow(dx, dx_ptr.dtype.element_ty), mask=inside)


def backward(
    grad: torch.Tensor, x: torch.Tensor, moments: torch.Tensor, num_groups: int, weight: _Optional, bias: _Optional,
    scale: _Optional, shift: _Optional, silu: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of x, weight, bias, scale and shift; an empty tensor for a parameter that is None."""
    dx = torch.empty_like(x)
    given = (weight, bias, scale, shift)
    grads = [None if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in given]
    if x.numel():
        channels_last = is_channels_last(dx)
        x_rows, dy_rows, dx_rows = (rows_of(t, channels_last) for t in (x, grad, dx))
        parameters = affine_of(weight, bias, scale, shift)
        sizes = sizes_of(channels_last, num_groups, parameters.frames, x_rows, dy_rows, dx_rows)
        tile = whole(x, sizes, BACKWARD_MOST) if sizes.frames == 1 else None
        call = (x_rows, dy_rows, dx_rows, moments, parameters, grads, silu)
        with launch.on_device(x):
            _two_passes(sizes, *call) if tile is None else whole_backward(tile, *call)
        dx = dx if dx_rows.tensor is dx else dx.copy_(dx_rows.tensor)
    else:
        grads = [None if g is None else g.zero_() for g in grads]
    return dx, *[x.new_empty(0) if g is None else g for g in grads]


def _two_passes(
    sizes: Sizes, x: Rows, dy: Rows, dx: Rows, moments: torch.Tensor, parameters: Affine, grads: list[_Optional],
    silu: bool,
) -> None:  # fmt: skip
    """Sums, what they mean for each group and parameter, then dx."""
    kind = shape_class(x.tensor, sizes.channels_last)
    options = functools.partial(candidates, sizes.channels_last)
    dweight, dbias, dscale, dshift = grads
    (channels, positions), (c_unit, s_unit) = sizes.extents(), sizes.units
    shared = {"C_UNIT": c_unit, "S_UNIT": s_unit, "CHANNELS_LAST": sizes.channels_last, "SILU": silu}
    spread = parameters.arguments()

    used = launch.configuration("group_norm_silu_bwd_sums", kind, _SHIPPED_SUMS, options)
    read = cut(x.tensor, sizes, True, used)
    sums = x.tensor.new_empty((sizes.batch, sizes.frames, read.parts, sizes.channels, 2), dtype=torch.float32)
    group_norm_silu_bwd_sums_kernel[(read.programs,)](
        x.tensor, dy.tensor, moments, sums, *spread, *sizes.strides(x, dy), channels, positions, sizes.frames,
        sizes.width, read.columns, read.parts, **shared, **read.constants(), **stages(used),
    )  # fmt: skip

    means = torch.empty_like(moments)
    shares = x.tensor.new_empty((sizes.batch, sizes.channels, 2), dtype=torch.float32)
    _groups(sums, means, shares, dscale, dshift, sizes, parameters, read)

    used = launch.configuration("group_norm_silu_bwd", kind, _SHIPPED[x.tensor.element_size()], options)
    written = cut(x.tensor, sizes, True, used)
    extra = 0 if dweight is None and dbias is None else written.columns
    group_norm_silu_bwd_kernel[(written.programs + extra,)](
        x.tensor, dy.tensor, dx.tensor, moments, means, shares, dweight, dbias, *spread, *sizes.strides(x, dy, dx),
        sizes.batch, channels, positions, sizes.frames, sizes.width, written.columns, written.parts,
        SAMPLES=samples_at_once(sizes.batch), **shared, **written.constants(), **stages(used),
    )  # fmt: skip


def _groups(
    sums: torch.Tensor, means: torch.Tensor, shares: torch.Tensor, dscale: _Optional, dshift: _Optional, sizes: Sizes,
    parameters: Affine, read: Cut,
) -> None:  # fmt: skip
    """One small program for each group of each sample."""
    (channels, positions), (c_unit, s_unit) = sizes.extents(), sizes.units
    frames, parts, block_c = _sums_tile(sizes.frames, read.parts, sizes.width)
    group_norm_silu_bwd_groups_kernel[(sizes.batch * sizes.groups,)](
        sums, means, shares, dscale, dshift, *parameters.arguments(), channels, positions, sizes.frames, sizes.width,
        read.parts, SCALE_PER_FRAME=dscale is not None and dscale.dim() == 3,
        SHIFT_PER_FRAME=dshift is not None and dshift.dim() == 3, C_UNIT=c_unit, S_UNIT=s_unit, FRAMES=frames,
        PARTS=parts, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _sums_tile(frames: int, parts: int, width: int) -> tuple[int, int, int]:
    """(FRAMES, PARTS, BLOCK_C) of the tiles that a group's sums are read in."""
    block_c = triton.next_power_of_2(width)
    frames = min(triton.next_power_of_2(frames), max(1, _SUMS_TILE // block_c))
    return frames, min(triton.next_power_of_2(parts), max(1, _SUMS_TILE // (block_c * frames))), block_c
