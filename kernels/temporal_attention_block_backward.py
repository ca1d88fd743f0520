"""The backward of temporal_attention_block, by recomputation.

**Computes** from x and dy: h, q, k, v and the weights P again; dO = dy Wo, dV = P^T dO, dS = P (dO V^T - its row sum
with P), dQ = s dS K, dK = s dS^T Q, dh = dQ Wq + dK Wk + dV Wv, and the norm's backward.
**Layout** as the forward; the workspace's rows are (tile, unit, row of the unit), dense.
**Work split** a program owns one tile of whole positions and walks over the heads, as the forward's. Up to 128 channels
(FUSED) it also sums dh in registers and finishes dx. Beyond, 64 rows of dh would fill the registers: dh is one GEMM of
the workspace's rows, and temporal_attention_block_norm_backward.py finishes.
**Weights' gradients** h, o, dy and the gradients of q, k, v of a chunk of tiles go to a workspace of at most 256 MiB
(or one tile); GEMMs (torch.mm, float32 results) and column sums follow, chunk after chunk in a fixed order: no atomics.
A vector parameter's gradient is summed per tile in the kernel, over tiles by torch.sum.
**Traffic** x and dy read, dx written: 3T; with all gradients (2C + 4*heads*D) elements a row written and read again.
**Precision** rounds where eager does (projections, dO, dq, dk, dv, h) and nowhere else: P, dscores and what rotary
turns are two x-dtype terms in the dots. Sums, norm and softmax in float32.
**Refuses** what the forward refuses. A non-finite value may reach the positions that share its rows (T up to 8; with
more than 128 channels up to 32).
**Learned** sm_90, bf16, 64 rows, one head at a time, 8 warps, none spills: C 64 (D 32) 255 registers, 84 KiB of shared
memory; C 128 255, 156 KiB; C 320 (D 40, T 16) 245, 68 KiB; C 320 (D 64, T 25) 255, 48 KiB; the norm alone 127, 4 KiB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import launch
from .launch import dot, narrow
from .temporal_attention_block_call import Call, Parameters, rows_of, written_back
from .temporal_attention_block_norm_backward import norm_sums, store_dx, temporal_attention_block_norm_bwd_kernel
from .temporal_attention_block_tile import (
    allowed_pairs,
    batched_dot,
    group_weights,
    head_columns,
    heads_apart,
    heads_together,
    load_out_weight,
    load_rows,
    load_scores_bias,
    load_weight,
    norm_statistics,
    normalised,
    projected,
    projected_whole,
    rotary_tables,
    softmax_rows,
    tile_rows,
    turned,
)
from .temporal_attention_block_workspace import Workspace


@triton.jit
def temporal_attention_block_bwd_kernel(
    x_ptr, grad_ptr, dx_ptr, q_weight_ptr, k_weight_ptr, v_weight_ptr, q_bias_ptr, k_bias_ptr, v_bias_ptr,
    out_weight_ptr, out_bias_ptr, norm_weight_ptr, norm_bias_ptr, embedding_ptr, attn_bias_ptr, mask_ptr, cos_ptr,
    sin_ptr, h_ptr, dq_ptr, dk_ptr, dv_ptr, o_ptr, dy_ptr, dq_bias_ptr, dk_bias_ptr, dv_bias_ptr, dout_bias_ptr,
    dnorm_weight_ptr, dnorm_bias_ptr, dembedding_ptr, dattn_bias_ptr,
    stride_xb, stride_xt, stride_xs, stride_xc, stride_gb, stride_gt, stride_gs, stride_gc,
    stride_dxb, stride_dxt, stride_dxs, stride_dxc, stride_q, stride_k, stride_v, stride_out, stride_d, stride_columns,
    positions, tiles, first_tile, eps, scale,
    T: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
    MASK_ROWS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, IS_CAUSAL: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, TP: tl.constexpr, PER_UNIT: tl.constexpr, DP: tl.constexpr, UNITS: tl.constexpr,
    GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile: recomputes q, k, v and the weights head by head; writes dx, its rows of the workspace, its sums."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    ROWS: tl.constexpr = UNITS * TP
    FUSED: tl.constexpr = CHUNK >= C
    GROUPS: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    local = tl.program_id(0).to(tl.int64)
    tile = first_tile + tl.program_id(0)
    batch = (tile // tiles).to(tl.int64)
    position, frame, valid = tile_rows((tile % tiles).to(tl.int64), positions, T, UNITS, TP, PER_UNIT)
    x_rows = batch * stride_xb + frame * stride_xt + position * stride_xs
    grad_rows = batch * stride_gb + frame * stride_gt + position * stride_gs
    mean, deviation = norm_statistics(x_ptr, x_rows, valid, stride_xc, eps, NORM, C, CHUNK, ROWS)
    work_row = local * ROWS + tl.arange(0, ROWS)
    h = None
    dy = None
    for start in tl.static_range(0, C, CHUNK):
        h, dy = _noted(
            x_ptr, x_rows, grad_ptr, grad_rows, valid, stride_xc, stride_gc, mean, deviation, frame, norm_weight_ptr,
            norm_bias_ptr, embedding_ptr, h_ptr, dy_ptr, dout_bias_ptr, local, work_row, stride_columns, start, C,
            CHUNK, DTYPE,
        )  # fmt: skip
    allowed = None
    if T * PER_UNIT < TP or PER_UNIT > 1 or IS_CAUSAL or MASK_ROWS > 0:
        allowed = allowed_pairs(mask_ptr, batch, MASK_ROWS, IS_CAUSAL, T, TP, PER_UNIT)
    cos = None
    sin = None
    if PAIRS > 0:
        cos, sin = rotary_tables(cos_ptr, sin_ptr, T, TP, DP, PAIRS)
    dh = tl.zeros([ROWS, CHUNK], tl.float32)
    for group in tl.range(0, GROUPS):
        if FUSED:
            q_weight, k_weight, v_weight = group_weights(
                group, q_weight_ptr, k_weight_ptr, v_weight_ptr, stride_q, stride_k, stride_v, HEADS, D, PAIRS, HALF, C,
                CHUNK, DTYPE, GROUP, DP,
            )  # fmt: skip
            q, k, v = projected_whole(
                h, q_weight, k_weight, v_weight, group, q_bias_ptr, k_bias_ptr, v_bias_ptr, None, None, HEADS, D, PAIRS,
                HALF, PRECISION, UNITS, TP, GROUP, DP,
            )  # fmt: skip
        else:
            q, k, v = projected(
                group, x_ptr, x_rows, valid, stride_xc, mean, deviation, frame, norm_weight_ptr, norm_bias_ptr,
                embedding_ptr, q_weight_ptr, k_weight_ptr, v_weight_ptr, stride_q, stride_k, stride_v, q_bias_ptr,
                k_bias_ptr, v_bias_ptr, None, None, HEADS, D, PAIRS, HALF, C, CHUNK, DTYPE, PRECISION, UNITS, TP, GROUP,
                DP,
            )  # fmt: skip
        row, row_valid = head_columns(group, HEADS, D, GROUP, DP, 0)
        do = _projected_gradient(
            dy, grad_ptr, grad_rows, valid, stride_gc, out_weight_ptr, stride_out, row, row_valid, C, CHUNK, DTYPE,
            PRECISION,
        )  # fmt: skip
        do = heads_apart(narrow(do, DTYPE), UNITS, TP, GROUP, DP)
        bias = None
        if attn_bias_ptr is not None:
            bias = load_scores_bias(attn_bias_ptr, group, HEADS, GROUP, UNITS, T, TP)
        if PAIRS > 0:
            # As in eager: rounded before the rotation, turned in float32.
            q = turned(q.to(tl.float32), cos, sin)
            k = turned(k.to(tl.float32), cos, sin)
        weights, total = softmax_rows(dot_wide(q, tl.permute(k, [0, 2, 1]), DTYPE, PRECISION), allowed, bias, scale)
        # dscores is a difference that a rounding error of the weights survives.
        weights = tl.div_rn(weights, total + tl.zeros_like(weights)) if DTYPE == tl.float32 else weights * (1.0 / total)
        if o_ptr is not None:
            o = heads_together(batched_dot(narrow(weights, DTYPE), v, PRECISION), UNITS, TP, GROUP, DP)
            tl.store(o_ptr + work_row[:, None] * (HEADS * D) + row[None, :], narrow(o, DTYPE), row_valid[None, :])
        dv = dot_wide(tl.permute(weights, [0, 2, 1]), do, DTYPE, PRECISION)
        dweights = batched_dot(do, tl.permute(v, [0, 2, 1]), PRECISION)
        dscores = weights * (dweights - tl.sum(weights * dweights, 2, keep_dims=True))
        if DTYPE == tl.float32:
            # Rows that sum to zero but for the rounding of the weights' own sum: k_bias's gradient is only that.
            dscores -= weights * tl.sum(dscores, 2, keep_dims=True)
        if dattn_bias_ptr is not None:
            _store_bias_sums(dattn_bias_ptr, local, group, dscores, HEADS, GROUP, UNITS, T, TP, PER_UNIT)
        dscores *= scale
        dq = dot_wide(dscores, k, DTYPE, PRECISION)
        dk = dot_wide(tl.permute(dscores, [0, 2, 1]), q, DTYPE, PRECISION)
        if PAIRS > 0:
            dq = turned(dq, cos, -sin)
            dk = turned(dk, cos, -sin)
        turned_row, row_valid = head_columns(group, HEADS, D, GROUP, DP, PAIRS if HALF else 0)
        dq = _columns_noted(heads_together(dq, UNITS, TP, GROUP, DP), dq_ptr, stride_d, work_row, dq_bias_ptr,
                            stride_columns, local, turned_row, row_valid, DTYPE)  # fmt: skip
        dk = _columns_noted(heads_together(dk, UNITS, TP, GROUP, DP), dk_ptr, stride_d, work_row, dk_bias_ptr,
                            stride_columns, local, turned_row, row_valid, DTYPE)  # fmt: skip
        dv = _columns_noted(heads_together(dv, UNITS, TP, GROUP, DP), dv_ptr, stride_d, work_row, dv_bias_ptr,
                            stride_columns, local, row, row_valid, DTYPE)  # fmt: skip
        if FUSED:
            dh += dot(dq, load_weight(q_weight_ptr, turned_row, row_valid, stride_q, 0, C, CHUNK, DTYPE), PRECISION)
            dh += dot(dk, load_weight(k_weight_ptr, turned_row, row_valid, stride_k, 0, C, CHUNK, DTYPE), PRECISION)
            dh += dot(dv, load_weight(v_weight_ptr, row, row_valid, stride_v, 0, C, CHUNK, DTYPE), PRECISION)
    if FUSED:
        along, across = norm_sums(
            dh, x_ptr, x_rows, valid, stride_xc, mean, deviation, norm_weight_ptr, dnorm_weight_ptr, dnorm_bias_ptr,
            dembedding_ptr, local, stride_columns, 0, T, C, CHUNK, UNITS, TP, PER_UNIT,
        )  # fmt: skip
        dx_rows = batch * stride_dxb + frame * stride_dxt + position * stride_dxs
        store_dx(
            dh, along, across, x_ptr, x_rows, grad_ptr, grad_rows, dx_ptr, dx_rows, valid, stride_xc, stride_gc,
            stride_dxc, mean, deviation, norm_weight_ptr, 0, C, CHUNK, NORM, RESIDUAL,
        )  # fmt: skip


@triton.jit
def _noted(
    x_ptr, x_rows, grad_ptr, grad_rows, valid, stride_xc, stride_gc, mean, deviation, frame, norm_weight_ptr,
    norm_bias_ptr, embedding_ptr, h_ptr, dy_ptr, dout_bias_ptr, local, work_row, stride_columns, first,
    C: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A chunk of h and dy (rows, CHUNK) in DTYPE, written to the workspace with dy's sums."""
    x = load_rows(x_ptr, x_rows, valid, stride_xc, first, C, CHUNK)
    h = normalised(x, mean, deviation, frame, valid, norm_weight_ptr, norm_bias_ptr, embedding_ptr, first, C, CHUNK,
                   DTYPE)  # fmt: skip
    wide = load_rows(grad_ptr, grad_rows, valid, stride_gc, first, C, CHUNK)
    dy = narrow(wide, DTYPE)
    channel = first + tl.arange(0, CHUNK)
    if h_ptr is not None:
        tl.store(h_ptr + work_row[:, None] * C + channel[None, :], h, (channel < C)[None, :])
    if dy_ptr is not None:
        tl.store(dy_ptr + work_row[:, None] * C + channel[None, :], dy, (channel < C)[None, :])
    if dout_bias_ptr is not None:
        tl.store(dout_bias_ptr + local * stride_columns + channel, tl.sum(wide, 0), channel < C)
    return h, dy


@triton.jit
def _projected_gradient(
    dy, grad_ptr, grad_rows, valid, stride_gc, out_weight_ptr, stride_out, row, row_valid, C: tl.constexpr,
    CHUNK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dy Wo of a group of heads' columns in float32; dy (rows, CHUNK) is whole where CHUNK holds C."""
    if CHUNK >= C:
        return dot(dy, load_out_weight(out_weight_ptr, row, row_valid, stride_out, 0, C, CHUNK, DTYPE), PRECISION)
    do = tl.zeros([dy.shape[0], row.shape[0]], tl.float32)
    for first in tl.range(0, C, CHUNK):
        part = narrow(load_rows(grad_ptr, grad_rows, valid, stride_gc, first, C, CHUNK), DTYPE)
        do += dot(part, load_out_weight(out_weight_ptr, row, row_valid, stride_out, first, C, CHUNK, DTYPE), PRECISION)
    return do


@triton.jit
def dot_wide(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b where either may be float32 though DTYPE is narrower: such an operand is the sum of two DTYPE ones.

    The rows of dscores sum to zero; rounded once they would not, and gradients that cancel (k_bias) would show it.
    """
    high_a = a if a.dtype == DTYPE else narrow(a, DTYPE)
    high_b = b if b.dtype == DTYPE else narrow(b, DTYPE)
    product = batched_dot(high_a, high_b, PRECISION)
    if a.dtype != DTYPE:
        product += batched_dot(narrow(a - high_a.to(tl.float32), DTYPE), high_b, PRECISION)
    if b.dtype != DTYPE:
        product += batched_dot(high_a, narrow(b - high_b.to(tl.float32), DTYPE), PRECISION)
    return product


@triton.jit
def _columns_noted(d, d_ptr, stride_d, work_row, bias_ptr, stride_columns, local, column, column_valid,
                   DTYPE: tl.constexpr):  # fmt: skip
    """d (rows, GROUP * DP) in DTYPE, written to the workspace with its sums, where they are wanted."""
    if bias_ptr is not None:
        # Before they are rounded: what cancels over the rows (k_bias) would leave the rounding.
        tl.store(bias_ptr + local * stride_columns + column, tl.sum(d, 0), column_valid)
    d = narrow(d, DTYPE)
    if d_ptr is not None:
        tl.store(d_ptr + work_row[:, None] * stride_d + column[None, :], d, column_valid[None, :])
    return d


@triton.jit
def _store_bias_sums(
    ptr, local, group, dscores, HEADS: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, T: tl.constexpr,
    TP: tl.constexpr, PER_UNIT: tl.constexpr,
):  # fmt: skip
    """A tile's sums of dscores over its units, at (tile * PER_UNIT + position of the unit, head, frame, frame)."""
    sums = tl.sum(tl.reshape(dscores, [GROUP, UNITS, TP, TP]), 1)
    head = group * GROUP + tl.arange(0, GROUP)[:, None, None]
    i = tl.arange(0, TP)[None, :, None]
    j = tl.arange(0, TP)[None, None, :]
    index = (((local * PER_UNIT + i // T) * HEADS + head) * T + i % T) * T + j % T
    tl.store(ptr + index, sums, (i < PER_UNIT * T) & (j < PER_UNIT * T) & (i // T == j // T) & (head < HEADS))


def backward(
    grad: torch.Tensor, x: torch.Tensor, parameters: Parameters, wanted: Sequence[bool], heads: int, norm: str | None,
    eps: float, mask: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None, rotary_style: str,
    scale: float, is_causal: bool, residual: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of x and of each parameter; an empty tensor where the parameter is None or its gradient unwanted."""
    dx = torch.empty_like(x)
    wanted = [want and p is not None for want, p in zip(wanted, parameters, strict=True)]
    if not x.numel():
        return [dx, *(torch.zeros_like(p, memory_format=torch.contiguous_format) if want else x.new_empty(0)
                      for want, p in zip(wanted, parameters, strict=True))]  # fmt: skip
    call = Call(x, parameters, heads, norm, mask, cos, sin, rotary_style, is_causal, residual)
    grad_rows, dx_rows = rows_of(grad), rows_of(dx)
    used = launch.configuration(
        "temporal_attention_block_backward", call.shape_class, shipped(call), lambda: candidates(call)
    )
    units, fused = used["UNITS"], used["CHUNK"] >= call.constants["C"]
    positions, tiles = call.tiles(units)
    space = Workspace(x, parameters, wanted, call, units, call.batch * tiles, whole=not fused)
    strides = (*call.rows.stride(), *grad_rows.stride(), *dx_rows.stride())
    weights = None if fused else torch.cat([p.to(x.dtype) for p in parameters[:3]])
    with launch.on_device(x):
        for first in range(0, call.batch * tiles, space.tiles):
            count = min(space.tiles, call.batch * tiles - first)
            temporal_attention_block_bwd_kernel[(count,)](
                call.rows, grad_rows, dx_rows, *call.parameters, *call.tables, *space.rows, *space.sums, *strides,
                *call.strides, *space.strides, positions, tiles, first, eps, scale, **call.constants, **used,
            )  # fmt: skip
            if not fused:
                _norm_backward(call, grad_rows, dx_rows, space, weights, strides, units, (positions, tiles, first),
                               count, eps)  # fmt: skip
            space.add(count)
    return [written_back(dx, dx_rows), *space.gradients(x, parameters)]


def _norm_backward(
    call: Call, grad_rows: torch.Tensor, dx_rows: torch.Tensor, space: Workspace, weights: torch.Tensor,
    strides: Sequence[int], units: int, where: tuple[int, int, int], count: int, eps: float,
) -> None:  # fmt: skip
    """dx of `count` tiles from the gradients of q, k, v that they left: too many channels to sum dh in registers."""
    dh = space.through_projections(count, weights)
    constants = {name: call.constants[name] for name in ("T", "C", "NORM", "RESIDUAL", "TP", "PER_UNIT")}
    temporal_attention_block_norm_bwd_kernel[(count,)](
        call.rows, grad_rows, dx_rows, dh, call.parameters[8], *space.sums[4:7], *strides, space.strides[1], *where,
        eps, **constants, UNITS=units, CHUNK=64, num_warps=8,
    )  # fmt: skip


def shipped(call: Call) -> launch.Configuration:
    """The backward's configuration of a shape class."""
    c = call.constants
    whole = max(16, triton.next_power_of_2(c["C"]))
    if call.item_bytes == 4:
        rows, chunk = 32, 32
    elif whole > 128:
        # With tables and biases 64 channels at a time fit 32 rows alone.
        rows, chunk = call.wide_rows, 64 if c["TP"] == 16 and (call.plain or call.wide_rows == 32) else 32
    else:
        rows, chunk = 64, whole
    # Prefetched tiles would not fit the registers beside float32 sums, or beside tables and biases.
    stages = 1 if call.item_bytes == 4 or (whole > 128 and not call.plain) else 2
    return {"UNITS": max(1, rows // c["TP"]), "GROUP": 1, "CHUNK": chunk, "num_warps": 8, "num_stages": stages}


def candidates(call: Call) -> list[launch.Configuration]:
    """What tuning may try in its place."""
    first = shipped(call)
    tp = call.constants["TP"]
    found = [first]
    for rows, group, warps in ((64, 1, 4), (64, 2, 4), (64, 2, 8), (128, 1, 8)):
        if group <= call.constants["HEADS"] and rows >= tp:
            found.append({**first, "UNITS": rows // tp, "GROUP": group, "num_warps": warps})
    if first["CHUNK"] >= 64:
        found.append({**first, "CHUNK": 32})
    return found
