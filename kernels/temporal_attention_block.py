"""The temporal attention block in one kernel: norm, projections, attention over frames, output projection, residual.

**Computes** y = x + Wo softmax(scale * rot(q) rot(k)^T + bias) v + bo, with q, k, v = W h + b and h = norm(x) +
frame_embedding, at every position and head.
**Layout** x and y as (B, T, S, C) with any strides; weights with dense rows, in any floating dtype.
**Work split** a program owns a tile of whole positions, 64 or 128 rows. Heads go in groups: [rows, C] x [C, group * D]
dots for q, k, v, which rows and warps then keep as (head, unit) batches of [T, D]: on sm_90 q and k pass from one
tensor-core instruction to the next within a thread, v by shuffles, and no dot or exponential is spent on two positions'
frames. The group's output is the operand of the output projection, whose [rows, C] sum stays in registers. With weights
of up to 128 KiB (the 64-channel level of video diffusion U-Nets) a program stays on its multiprocessor, keeps them in
shared memory for all its tiles (STEPS > 0) and fetches the next tile of x meanwhile: streaming them for every tile
would read 268 MB or more from L2 there, 49 us. Beyond 128 channels h is normalised again chunk by chunk for every
group: it fits neither registers nor, with the weights, shared memory.
**Traffic** x read, y written: 2T; weights from L2 once per tile, or once per program where they are resident.
**Precision** h, q, k, v, P and o rounded to x's dtype for the dots, sums, norm and softmax in float32; h's statistics
by Chan's merge of exact chunks.
**Refuses** C > 320, D > 128, T > 64 (fastvdiff/ops says so), float64.
**Learned** Nothing spills at a shipped configuration on sm_80, sm_90 and sm_100, but with Triton 3.6 six registers of
the one that follows. sm_90, bf16: C 64, D 32, T 16 (128 rows, 2 heads at a time, 8 warps, resident): 255 registers,
164 KiB of shared memory; with 4 heads at a time it spilled 21 values, and with tables and biases beside them any number
of heads did: such calls stream the weights. C 320, D 64, T 25: 255, 97 KiB; C 320, D 40, T 16: 248, 36 KiB. By
arithmetic: 10.4 thousand cycles of tensor and ALU work for 128 rows at C 64, so 95 us for B 4, 64x64 without overlap
and 70 where the two warps of a scheduler overlap; the aim is 80. On an H100 120 us in channels_last and 211 in
contiguous, 22 and 13 times as fast as eager, of a limit of 48: eight warps of 255 registers are all that fit, and wait
for each other's dots. C 320, D 64, T 25 at 72x128: 3.0 and 10.9 ms, where eager takes 4.0 and 5.8: not used by itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .launch import dot, narrow
from .temporal_attention_block_backward import backward as backward  # the op's other half
from .temporal_attention_block_call import Call, Parameters, rows_of, written_back
from .temporal_attention_block_tile import (
    allowed_pairs,
    batched_dot,
    contained,
    group_weights,
    head_columns,
    heads_together,
    load_out_weight,
    load_rows,
    load_rows_again,
    load_scores_bias,
    load_vector,
    norm_statistics,
    normalised,
    projected,
    projected_whole,
    rotary_tables,
    softmax_rows,
    store_rows,
    tile_rows,
)

_RESIDENT_BYTES = 128 * 1024


@triton.jit
def temporal_attention_block_fwd_kernel(
    x_ptr, y_ptr, q_weight_ptr, k_weight_ptr, v_weight_ptr, q_bias_ptr, k_bias_ptr, v_bias_ptr, out_weight_ptr,
    out_bias_ptr, norm_weight_ptr, norm_bias_ptr, embedding_ptr, attn_bias_ptr, mask_ptr, cos_ptr, sin_ptr,
    stride_xb, stride_xt, stride_xs, stride_xc, stride_yb, stride_yt, stride_ys, stride_yc,
    stride_q, stride_k, stride_v, stride_out, positions, tiles, all_tiles, eps, scale,
    T: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
    MASK_ROWS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, IS_CAUSAL: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, TP: tl.constexpr, PER_UNIT: tl.constexpr, DP: tl.constexpr, C0: tl.constexpr,
    C1: tl.constexpr, UNITS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """y = x + Wo softmax(q k^T) v, tile by tile; with STEPS > 0 a program loads the weights once for all its tiles."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    GROUPS: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    weights = ()
    if STEPS > 0:
        for group in tl.static_range(0, GROUPS):
            weights += group_weights(
                group, q_weight_ptr, k_weight_ptr, v_weight_ptr, stride_q, stride_k, stride_v, HEADS, D, PAIRS, HALF, C,
                CHUNK, DTYPE, GROUP, DP,
            )  # fmt: skip
            row, row_valid = head_columns(group, HEADS, D, GROUP, DP, 0)
            weights += (load_out_weight(out_weight_ptr, row, row_valid, stride_out, 0, C, C0, DTYPE),)
    cos = None
    sin = None
    if PAIRS > 0:
        cos, sin = rotary_tables(cos_ptr, sin_ptr, T, TP, DP, PAIRS)
    for step in tl.range(0, STEPS if STEPS > 0 else 1):
        _tile(
            tl.program_id(0) + step * tl.num_programs(0), weights, x_ptr, y_ptr, q_weight_ptr, k_weight_ptr,
            v_weight_ptr, q_bias_ptr, k_bias_ptr, v_bias_ptr, out_weight_ptr, out_bias_ptr, norm_weight_ptr,
            norm_bias_ptr, embedding_ptr, attn_bias_ptr, mask_ptr, cos, sin, stride_xb, stride_xt, stride_xs, stride_xc,
            stride_yb, stride_yt, stride_ys, stride_yc, stride_q, stride_k, stride_v, stride_out, positions, tiles,
            all_tiles, eps, scale, T, C, D, HEADS, NORM, MASK_ROWS, PAIRS, HALF, IS_CAUSAL, RESIDUAL, PRECISION, TP,
            PER_UNIT, DP, C0, C1, UNITS, GROUP, CHUNK, STEPS,
        )  # fmt: skip


@triton.jit
def _tile(
    tile, weights, x_ptr, y_ptr, q_weight_ptr, k_weight_ptr, v_weight_ptr, q_bias_ptr, k_bias_ptr, v_bias_ptr,
    out_weight_ptr, out_bias_ptr, norm_weight_ptr, norm_bias_ptr, embedding_ptr, attn_bias_ptr, mask_ptr, cos,
    sin, stride_xb, stride_xt, stride_xs, stride_xc, stride_yb, stride_yt, stride_ys, stride_yc, stride_q, stride_k,
    stride_v, stride_out, positions, tiles, all_tiles, eps, scale,
    T: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
    MASK_ROWS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, IS_CAUSAL: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, TP: tl.constexpr, PER_UNIT: tl.constexpr, DP: tl.constexpr, C0: tl.constexpr,
    C1: tl.constexpr, UNITS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    ROWS: tl.constexpr = UNITS * TP
    GROUPS: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    # A grid's index, and so a tile's, fits 32 bits. A program without a tile in the last step repeats one, bit by bit.
    tile = tl.minimum(tile, all_tiles - 1)
    batch = (tile // tiles).to(tl.int64)
    position, frame, valid = tile_rows((tile % tiles).to(tl.int64), positions, T, UNITS, TP, PER_UNIT)
    x_rows = batch * stride_xb + frame * stride_xt + position * stride_xs
    mean, deviation = norm_statistics(x_ptr, x_rows, valid, stride_xc, eps, NORM, C, CHUNK, ROWS)
    allowed = None
    if T * PER_UNIT < TP or PER_UNIT > 1 or IS_CAUSAL or MASK_ROWS > 0:
        allowed = allowed_pairs(mask_ptr, batch, MASK_ROWS, IS_CAUSAL, T, TP, PER_UNIT)
    h = None
    if CHUNK >= C:
        x = load_rows(x_ptr, x_rows, valid, stride_xc, 0, C, CHUNK)
        h = normalised(x, mean, deviation, frame, valid, norm_weight_ptr, norm_bias_ptr, embedding_ptr, 0, C, CHUNK,
                       DTYPE)  # fmt: skip
    result0 = tl.zeros([ROWS, C0], tl.float32)
    result1 = tl.zeros([ROWS, C1 if C1 > 0 else 16], tl.float32)
    if STEPS > 0:
        for group in tl.static_range(0, GROUPS):
            q, k, v = projected_whole(
                h, weights[4 * group], weights[4 * group + 1], weights[4 * group + 2], group, q_bias_ptr, k_bias_ptr,
                v_bias_ptr, cos, sin, HEADS, D, PAIRS, HALF, PRECISION, UNITS, TP, GROUP, DP,
            )  # fmt: skip
            o = _attended(q, k, v, group, allowed, attn_bias_ptr, scale, HEADS, T, PRECISION, UNITS, TP, PER_UNIT,
                          GROUP, DP)  # fmt: skip
            result0 += dot(o, tl.trans(weights[4 * group + 3]), PRECISION)
    else:
        for group in tl.range(0, GROUPS):
            if CHUNK >= C:
                q_weight, k_weight, v_weight = group_weights(
                    group, q_weight_ptr, k_weight_ptr, v_weight_ptr, stride_q, stride_k, stride_v, HEADS, D, PAIRS,
                    HALF, C, CHUNK, DTYPE, GROUP, DP,
                )  # fmt: skip
                q, k, v = projected_whole(
                    h, q_weight, k_weight, v_weight, group, q_bias_ptr, k_bias_ptr, v_bias_ptr, cos, sin, HEADS, D,
                    PAIRS, HALF, PRECISION, UNITS, TP, GROUP, DP,
                )  # fmt: skip
            else:
                q, k, v = projected(
                    group, x_ptr, x_rows, valid, stride_xc, mean, deviation, frame, norm_weight_ptr, norm_bias_ptr,
                    embedding_ptr, q_weight_ptr, k_weight_ptr, v_weight_ptr, stride_q, stride_k, stride_v, q_bias_ptr,
                    k_bias_ptr, v_bias_ptr, cos, sin, HEADS, D, PAIRS, HALF, C, CHUNK, DTYPE, PRECISION, UNITS, TP,
                    GROUP, DP,
                )  # fmt: skip
            o = _attended(q, k, v, group, allowed, attn_bias_ptr, scale, HEADS, T, PRECISION, UNITS, TP, PER_UNIT,
                          GROUP, DP)  # fmt: skip
            row, row_valid = head_columns(group, HEADS, D, GROUP, DP, 0)
            out = load_out_weight(out_weight_ptr, row, row_valid, stride_out, 0, C, C0, DTYPE)
            result0 += dot(o, tl.trans(out), PRECISION)
            if C1 > 0:
                out = load_out_weight(out_weight_ptr, row, row_valid, stride_out, C0, C, C1, DTYPE)
                result1 += dot(o, tl.trans(out), PRECISION)
    y_rows = batch * stride_yb + frame * stride_yt + position * stride_ys
    result0 = finished(result0, x_ptr, x_rows, valid, stride_xc, out_bias_ptr, 0, C, C0, RESIDUAL)
    store_rows(y_ptr, y_rows, valid, stride_yc, 0, result0, C, C0)
    if C1 > 0:
        result1 = finished(result1, x_ptr, x_rows, valid, stride_xc, out_bias_ptr, C0, C, C1, RESIDUAL)
        store_rows(y_ptr, y_rows, valid, stride_yc, C0, result1, C, C1)


@triton.jit
def _attended(
    q, k, v, group, allowed, attn_bias_ptr, scale, HEADS: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    UNITS: tl.constexpr, TP: tl.constexpr, PER_UNIT: tl.constexpr, GROUP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """softmax(q k^T) v of a group of heads, as the operand (rows, GROUP * DP) of the output projection."""
    bias = None
    if attn_bias_ptr is not None:
        bias = load_scores_bias(attn_bias_ptr, group, HEADS, GROUP, UNITS, T, TP)
    weights, total = softmax_rows(batched_dot(q, tl.permute(k, [0, 2, 1]), PRECISION), allowed, bias, scale)
    share = 1.0 / total
    if PER_UNIT > 1:
        v, lost = contained(v, T, TP)
        share += lost
    o = batched_dot(narrow(weights, v.dtype), v, PRECISION) * share
    return heads_together(narrow(o, v.dtype), UNITS, TP, GROUP, DP)


@triton.jit
def finished(
    result, x_ptr, x_rows, valid, stride_xc, out_bias_ptr, first, C: tl.constexpr, WIDTH: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The block's result from a part of its output projection: + out_bias + x."""
    if out_bias_ptr is not None:
        channel = first + tl.arange(0, WIDTH)
        result += load_vector(out_bias_ptr, channel, channel < C, 0.0)[None, :]
    if RESIDUAL:
        result += load_rows_again(x_ptr, x_rows, valid, stride_xc, first, C, WIDTH)
    return result


def forward(
    x: torch.Tensor, parameters: Parameters, heads: int, norm: str | None, eps: float, mask: torch.Tensor | None,
    cos: torch.Tensor | None, sin: torch.Tensor | None, rotary_style: str, scale: float, is_causal: bool,
    residual: bool,
) -> torch.Tensor:  # fmt: skip
    """The block's result, with the strides of `torch.empty_like(x)`."""
    y = torch.empty_like(x)
    if not x.numel():
        return y
    call = Call(x, parameters, heads, norm, mask, cos, sin, rotary_style, is_causal, residual)
    y_rows = rows_of(y)
    used = dict(
        launch.configuration("temporal_attention_block", call.shape_class, shipped(call), lambda: candidates(call))
    )
    positions, tiles = call.tiles(used["UNITS"])
    all_tiles = call.batch * tiles
    resident = used.pop("RESIDENT")
    programs = min(all_tiles, launch.multiprocessors(x)) if resident else all_tiles
    steps = triton.cdiv(all_tiles, programs) if resident else 0
    parts = {"C0": used["CHUNK"], "C1": 0} if resident else call.parts  # the output weight stays as a whole
    with launch.on_device(x):
        temporal_attention_block_fwd_kernel[(programs,)](
            call.rows, y_rows, *call.parameters, *call.tables, *call.rows.stride(), *y_rows.stride(), *call.strides,
            positions, tiles, all_tiles, eps, scale, **call.constants, **parts, STEPS=steps, **used,
        )  # fmt: skip
    return written_back(y, y_rows)


def shipped(call: Call) -> launch.Configuration:
    """The forward's configuration of a shape class."""
    c = call.constants
    whole = max(16, triton.next_power_of_2(c["C"]))
    resident, stages = False, 2
    if call.item_bytes == 4:
        rows, group, chunk, warps = 32, 1, 32, 8
    elif whole > 128:
        rows, group, warps = call.wide_rows, 1, 8
        chunk, stages = (64, 3) if c["TP"] == 64 else (32, 2)
    elif whole == 128:
        rows, group, chunk, warps = 64 if 0 < call.architecture < 90 else 128, 1, whole, 8
    elif call.architecture == 90 and 4 * whole * c["HEADS"] * c["DP"] * call.item_bytes <= _RESIDENT_BYTES:
        # Only there do dots read their second operand from shared memory and leave the sums in registers, which do not
        # suffice for tables and biases beside them.
        rows, group, chunk, warps, resident = 128, max(1, 64 // c["DP"]), whole, 8, call.plain
    else:
        # Before sm_90 operands are held in registers too: a head at a time.
        group = 1 if 0 < call.architecture < 90 else max(1, 64 // c["DP"])
        rows, chunk, warps = 64, whole, 4
    group = min(group, triton.next_power_of_2(c["HEADS"]))
    return {"UNITS": max(1, rows // c["TP"]), "GROUP": group, "CHUNK": chunk, "RESIDENT": resident, "num_warps": warps,
            "num_stages": stages}  # fmt: skip


def candidates(call: Call) -> list[launch.Configuration]:
    """What tuning may try in its place."""
    first = shipped(call)
    tp, heads = call.constants["TP"], call.constants["HEADS"]
    found = [first]
    for rows, group, warps in ((64, 1, 4), (64, 2, 4), (64, 1, 8), (64, 2, 8), (128, 1, 8), (128, 2, 8), (128, 4, 8)):
        if group <= heads and rows >= tp:
            found.append({**first, "UNITS": rows // tp, "GROUP": group, "num_warps": warps})
            if first["RESIDENT"]:
                found.append({**found[-1], "RESIDENT": False})
    return found[:12]
