"""The temporal attention block's way back through its norm, at the end of the fused backward or as a kernel of its own.

**Computes** dx = deviation * (g - mean(g) - n mean(g n)) [+ dy], n = norm(x), g = dh * norm_weight, means over C; and
per tile the sums of dh * n, dh and dh by frame that norm_weight, norm_bias and frame_embedding need.
**Layout** x, dy, dx with any strides; dh (tile rows, C) of the workspace.
**Work split** a program owns one tile of whole positions, as the attention kernels do.
**Traffic** x and dh read twice (the second time from cache), dy read, dx written: 4T, with 1T of dh written before.
**Precision** float32 within; statistics by Chan's merge of exact chunks.
**Refuses** nothing beyond the block itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .temporal_attention_block_tile import (
    load_rows,
    load_rows_again,
    load_vector,
    norm_statistics,
    store_rows,
    tile_rows,
)


@triton.jit
def norm_sums(
    dh, x_ptr, x_rows, valid, stride_xc, mean, deviation, norm_weight_ptr, dnorm_weight_ptr, dnorm_bias_ptr,
    dembedding_ptr, local, stride_columns, FIRST: tl.constexpr, T: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    UNITS: tl.constexpr, TP: tl.constexpr, PER_UNIT: tl.constexpr,
):  # fmt: skip
    """Sums of dh * weight and of dh * weight * norm(x) over a part's channels (rows, 1); stores the tile's own sums."""
    channel = FIRST + tl.arange(0, WIDTH)
    inside = channel < C
    x = load_rows(x_ptr, x_rows, valid, stride_xc, FIRST, C, WIDTH)
    # A row of zeros that stands for nothing may have an infinite reciprocal deviation.
    x = tl.where(tl.reshape(valid, [UNITS * TP, 1]) & inside[None, :], (x - mean) * deviation, 0.0)
    if dnorm_weight_ptr is not None:
        tl.store(dnorm_weight_ptr + local * stride_columns + channel, tl.sum(dh * x, 0), inside)
    if dnorm_bias_ptr is not None:
        tl.store(dnorm_bias_ptr + local * stride_columns + channel, tl.sum(dh, 0), inside)
    if dembedding_ptr is not None:
        sums = tl.sum(tl.reshape(dh, [UNITS, TP, WIDTH]), 0)
        row = tl.arange(0, TP)[:, None]
        index = (local * PER_UNIT * T + row) * C + channel[None, :]
        tl.store(dembedding_ptr + index, sums, (row < PER_UNIT * T) & inside[None, :])
    if norm_weight_ptr is not None:
        dh *= load_vector(norm_weight_ptr, channel, inside, 0.0)[None, :]
    return tl.sum(dh, 1, keep_dims=True), tl.sum(dh * x, 1, keep_dims=True)


@triton.jit
def store_dx(
    dh, along, across, x_ptr, x_rows, grad_ptr, grad_rows, dx_ptr, dx_rows, valid, stride_xc, stride_gc, stride_dxc,
    mean, deviation, norm_weight_ptr, FIRST: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """dx of a part's channels from the gradient of the normalised rows and its two row sums."""
    channel = FIRST + tl.arange(0, WIDTH)
    if norm_weight_ptr is not None:
        dh *= load_vector(norm_weight_ptr, channel, channel < C, 0.0)[None, :]
    if NORM > 0:
        x = (load_rows_again(x_ptr, x_rows, valid, stride_xc, FIRST, C, WIDTH) - mean) * deviation
        dh -= x * (across / C)
        if NORM == 1:
            dh -= along / C
        dh *= deviation
    if RESIDUAL:
        dh += load_rows(grad_ptr, grad_rows, valid, stride_gc, FIRST, C, WIDTH)
    store_rows(dx_ptr, dx_rows, valid, stride_dxc, FIRST, dh, C, WIDTH)


@triton.jit
def temporal_attention_block_norm_bwd_kernel(
    x_ptr, grad_ptr, dx_ptr, dh_ptr, norm_weight_ptr, dnorm_weight_ptr, dnorm_bias_ptr, dembedding_ptr,
    stride_xb, stride_xt, stride_xs, stride_xc, stride_gb, stride_gt, stride_gs, stride_gc,
    stride_dxb, stride_dxt, stride_dxs, stride_dxc, stride_columns, positions, tiles, first_tile, eps,
    T: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, TP: tl.constexpr,
    PER_UNIT: tl.constexpr, UNITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile: dx and the tile's sums from dh in the workspace, CHUNK channels at a time."""
    ROWS: tl.constexpr = UNITS * TP
    local = tl.program_id(0).to(tl.int64)
    tile = first_tile + tl.program_id(0)
    batch = (tile // tiles).to(tl.int64)
    position, frame, valid = tile_rows((tile % tiles).to(tl.int64), positions, T, UNITS, TP, PER_UNIT)
    x_rows = batch * stride_xb + frame * stride_xt + position * stride_xs
    grad_rows = batch * stride_gb + frame * stride_gt + position * stride_gs
    dx_rows = batch * stride_dxb + frame * stride_dxt + position * stride_dxs
    dh_rows = tl.reshape((local * ROWS + tl.arange(0, ROWS)) * C, [UNITS, TP, 1])
    mean, deviation = norm_statistics(x_ptr, x_rows, valid, stride_xc, eps, NORM, C, CHUNK, ROWS)
    along = tl.zeros([ROWS, 1], tl.float32)
    across = tl.zeros([ROWS, 1], tl.float32)
    for first in tl.static_range(0, C, CHUNK):
        dh = load_rows(dh_ptr, dh_rows, valid, 1, first, C, CHUNK)
        along_here, across_here = norm_sums(
            dh, x_ptr, x_rows, valid, stride_xc, mean, deviation, norm_weight_ptr, dnorm_weight_ptr, dnorm_bias_ptr,
            dembedding_ptr, local, stride_columns, first, T, C, CHUNK, UNITS, TP, PER_UNIT,
        )  # fmt: skip
        along += along_here
        across += across_here
    for first in tl.static_range(0, C, CHUNK):
        dh = load_rows_again(dh_ptr, dh_rows, valid, 1, first, C, CHUNK)
        store_dx(
            dh, along, across, x_ptr, x_rows, grad_ptr, grad_rows, dx_ptr, dx_rows, valid, stride_xc, stride_gc,
            stride_dxc, mean, deviation, norm_weight_ptr, first, C, CHUNK, NORM, RESIDUAL,
        )  # fmt: skip
