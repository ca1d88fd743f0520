"""Temporal attention whose frames fit one tile (T and Tk up to 64): every tensor is read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import narrow
from .temporal_attention_tile import (
    add_product,
    attended,
    exp_from,
    halved,
    inner_products,
    inverse_of,
    load,
    load_turned,
    product,
    rows_at,
    sequences_at,
    store_part,
    store_turned_part,
    transposed,
)


@triton.jit
def temporal_attention_fwd_kernel(
    q, k, v, y, rotary, terms, sizes, scale,
    D: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
    CAUSAL: tl.constexpr, HEADS_INNER: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """GROUP whole sequences a program."""
    at, exist = sequences_at(tl.program_id(0).to(INDEX) * GROUP, sizes, GROUP, INDEX)
    t, c = tl.arange(0, ROWS)[None, :, None], tl.arange(0, KEYS)[None, :, None]
    is_query, is_key = t < sizes.frames, c < sizes.keys
    key_row = c if rotary is None else c + rotary.k_offset
    # All reads before the first dot: they wait for memory together.
    q_tile, q_low = load_turned(
        q, rows_at(at, t, q, ALIGN), exist & is_query, rotary, t, is_query, D, STARTS, WIDTHS, PAIRS, HALF
    )
    k_tile, k_low = load_turned(
        k, rows_at(at, c, k, ALIGN), exist & is_key, rotary, key_row, is_key, D, STARTS, WIDTHS, PAIRS, HALF
    )
    v_tile = load(v, rows_at(at, c, v, ALIGN), exist & is_key, D, STARTS, WIDTHS)

    scores = inner_products(q_tile, q_low, k_tile, k_low, PRECISION) * scale
    scores = attended(scores, at, t, transposed(c), exist, sizes, terms, CAUSAL, HEADS_INNER)
    weights = exp_from(scores, tl.max(scores, 2)[:, :, None])
    sums = tl.sum(weights, 2)[:, :, None]
    # Without bias and mask every query has a key: a sum of 0 is one of scores at -inf, and 0 / 0 is what softmax gives.
    inverse = 1.0 / sums if terms.bias is None and terms.mask is None else inverse_of(sums)
    weights = narrow(weights, v.ptr.dtype.element_ty)
    y_rows = rows_at(at, t, y, ALIGN)
    for i in tl.static_range(len(WIDTHS)):
        values = product(weights, v_tile[i], PRECISION) * inverse
        store_part(y, y_rows, exist & is_query, values, D, STARTS[i], WIDTHS[i])


@triton.jit
def temporal_attention_bwd_kernel(
    grad, q, k, v, dq, dk, dv, dbias_ptr, rotary, terms, sizes, scale, heads,
    D: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
    CAUSAL: tl.constexpr, HEADS_INNER: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """GROUP whole sequences a program and step; the weights are computed again.

    With dbias the sequences of a program are of one head, `sizes` count those of one head (outer = 1), and the scores'
    gradients are summed over the program's STEPS into dbias (slots, heads, T, Tk). Else STEPS is 1.
    """
    NARROW: tl.constexpr = q.ptr.dtype.element_ty
    t, c = tl.arange(0, ROWS)[None, :, None], tl.arange(0, KEYS)[None, :, None]
    is_query, is_key = t < sizes.frames, c < sizes.keys
    key_row = c if rotary is None else c + rotary.k_offset
    program = tl.program_id(0).to(INDEX)
    slot, head = program, program * 0
    if dbias_ptr is not None:
        # Neighbouring programs take neighbouring heads, which may share lines of memory.
        slot, head = program // heads, program % heads
    summed = tl.zeros((GROUP, ROWS, KEYS), tl.float32)
    for step in range(STEPS):
        place, exist = sequences_at((slot * STEPS + step) * GROUP, sizes, GROUP, INDEX)
        at = (place[0], place[1] + head, place[2])
        q_keep, k_keep = exist & is_query, exist & is_key
        q_tile, q_low = load_turned(
            q, rows_at(at, t, q, ALIGN), q_keep, rotary, t, is_query, D, STARTS, WIDTHS, PAIRS, HALF
        )
        k_tile, k_low = load_turned(
            k, rows_at(at, c, k, ALIGN), k_keep, rotary, key_row, is_key, D, STARTS, WIDTHS, PAIRS, HALF
        )
        v_tile = load(v, rows_at(at, c, v, ALIGN), k_keep, D, STARTS, WIDTHS)
        grad_tile = load(grad, rows_at(at, t, grad, ALIGN), q_keep, D, STARTS, WIDTHS)

        scores = inner_products(q_tile, q_low, k_tile, k_low, PRECISION) * scale
        scores = attended(scores, at, t, transposed(c), exist, sizes, terms, CAUSAL, HEADS_INNER)
        weights = exp_from(scores, tl.max(scores, 2)[:, :, None])
        weights *= inverse_of(tl.sum(weights, 2)[:, :, None])
        dweights = inner_products(grad_tile, (), v_tile, (), PRECISION)
        dscores = weights * (dweights - tl.sum(weights * dweights, 2)[:, :, None])
        if dbias_ptr is not None:
            summed += dscores
        weights = narrow(weights, NARROW)
        # A row of dscores sums to 0: where keys are alike, dq is what its rounding leaves. So both halves count.
        dscores, dscores_low = halved(dscores * scale, NARROW)

        dq_rows, dk_rows, dv_rows = rows_at(at, t, dq, ALIGN), rows_at(at, c, dk, ALIGN), rows_at(at, c, dv, ALIGN)
        for i in tl.static_range(len(WIDTHS)):
            values = product(dscores, k_tile[i], PRECISION)
            for j in tl.static_range(len(dscores_low)):
                values = add_product(values, dscores_low[j], k_tile[i], PRECISION)
            store_turned_part(dq, dq_rows, q_keep, values, rotary, t, is_query, D, STARTS[i], WIDTHS[i], PAIRS, HALF)
        for i in tl.static_range(len(WIDTHS)):
            values = product(transposed(dscores), q_tile[i], PRECISION)
            store_turned_part(
                dk, dk_rows, k_keep, values, rotary, key_row, is_key, D, STARTS[i], WIDTHS[i], PAIRS, HALF
            )
        for i in tl.static_range(len(WIDTHS)):
            values = product(transposed(weights), grad_tile[i], PRECISION)
            store_part(dv, dv_rows, k_keep, values, D, STARTS[i], WIDTHS[i])
    if dbias_ptr is not None:
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :]
        ptrs = dbias_ptr + (program * (sizes.frames * sizes.keys) + row * sizes.keys + column)
        tl.store(ptrs, tl.sum(summed, 0), mask=(row < sizes.frames) & (column < sizes.keys))
