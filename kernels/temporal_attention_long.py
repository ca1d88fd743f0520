"""Temporal attention over more frames than one tile holds: blocks of ROWS queries against blocks of KEYS keys."""

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
    rows_at,
    sequences_at,
    store_part,
    store_turned_part,
    transposed,
)


@triton.jit
def blocks_at(sizes, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, INDEX: tl.constexpr):
    """This program's sequences, as `sequences_at` gives them, and its block of frames (1, BLOCK, 1).

    Blocks of the same sequences run side by side: what they share is read from memory once.
    """
    program = tl.program_id(0)
    at, exist = sequences_at((program // BLOCKS).to(INDEX) * GROUP, sizes, GROUP, INDEX)
    return at, exist, program % BLOCKS * BLOCK + tl.arange(0, BLOCK)[None, :, None]


@triton.jit
def load_keys(
    k, v, at, exist, c, rotary, sizes, D: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Turned keys c with their low parts, and the values."""
    is_key = c < sizes.keys
    key_row = c if rotary is None else c + rotary.k_offset
    k_tile, k_low = load_turned(
        k, rows_at(at, c, k, ALIGN), exist & is_key, rotary, key_row, is_key, D, STARTS, WIDTHS, PAIRS, HALF
    )
    return k_tile, k_low, load(v, rows_at(at, c, v, ALIGN), exist & is_key, D, STARTS, WIDTHS)


@triton.jit
def load_queries(
    q, at, exist, t, rotary, sizes, D: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Turned queries t with their low parts."""
    is_query = t < sizes.frames
    return load_turned(
        q, rows_at(at, t, q, ALIGN), exist & is_query, rotary, t, is_query, D, STARTS, WIDTHS, PAIRS, HALF
    )


@triton.jit
def zeros_part(GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A float32 sum for one part."""
    return tl.zeros((GROUP, ROWS, WIDTH), tl.float32)


@triton.jit
def zeros_of(GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """A float32 sum for each part."""
    sums = ()
    for i in tl.static_range(len(WIDTHS)):
        sums = sums + (zeros_part(GROUP, ROWS, WIDTHS[i]),)
    return sums


@triton.jit
def scaled(sums, factor):
    """Each part times a factor."""
    products = ()
    for i in tl.static_range(len(sums)):
        products = products + (sums[i] * factor,)
    return products


@triton.jit
def add_products(sums, a, b, PRECISION: tl.constexpr):
    """sums + a @ b for each part of b."""
    added = ()
    for i in tl.static_range(len(b)):
        added = added + (add_product(sums[i], a, b[i], PRECISION),)
    return added


@triton.jit
def temporal_attention_long_fwd_kernel(
    q, k, v, y, rotary, terms, sizes, scale,
    D: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
    CAUSAL: tl.constexpr, HEADS_INNER: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, INDEX: tl.constexpr,
    ROW_BLOCKS: tl.constexpr, KEY_BLOCKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A block of queries of GROUP sequences a program, against all of their keys, with a running softmax."""
    at, exist, t = blocks_at(sizes, ROW_BLOCKS, ROWS, GROUP, INDEX)
    q_tile, q_low = load_queries(q, at, exist, t, rotary, sizes, D, STARTS, WIDTHS, PAIRS, HALF, ALIGN)
    maxima = tl.full((GROUP, ROWS, 1), float("-inf"), tl.float32)
    sums = tl.zeros((GROUP, ROWS, 1), tl.float32)
    values = zeros_of(GROUP, ROWS, WIDTHS)
    for block in range(KEY_BLOCKS):
        c = block * KEYS + tl.arange(0, KEYS)[None, :, None]
        k_tile, k_low, v_tile = load_keys(k, v, at, exist, c, rotary, sizes, D, STARTS, WIDTHS, PAIRS, HALF, ALIGN)
        scores = inner_products(q_tile, q_low, k_tile, k_low, PRECISION) * scale
        scores = attended(scores, at, t, transposed(c), exist, sizes, terms, CAUSAL, HEADS_INNER)
        larger = tl.maximum(maxima, tl.max(scores, 2)[:, :, None])
        kept = exp_from(maxima, larger)
        weights = exp_from(scores, larger)
        sums = sums * kept + tl.sum(weights, 2)[:, :, None]
        values = add_products(scaled(values, kept), narrow(weights, v.ptr.dtype.element_ty), v_tile, PRECISION)
        maxima = larger
    # Without bias and mask every query has a key: a sum of 0 is one of scores at -inf, and 0 / 0 is what softmax gives.
    inverse = 1.0 / sums if terms.bias is None and terms.mask is None else inverse_of(sums)
    y_rows = rows_at(at, t, y, ALIGN)
    for i in tl.static_range(len(WIDTHS)):
        store_part(y, y_rows, exist & (t < sizes.frames), values[i] * inverse, D, STARTS[i], WIDTHS[i])


@triton.jit
def temporal_attention_long_bwd_rows_kernel(
    grad, q, k, v, dq, statistics, rotary, terms, sizes, scale,
    D: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
    CAUSAL: tl.constexpr, HEADS_INNER: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, INDEX: tl.constexpr,
    ROW_BLOCKS: tl.constexpr, KEY_BLOCKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries of GROUP sequences, and their statistics for the kernels of keys and bias.

    These are log(sum(exp(scores))), +inf for a query without keys so that its weights come out as 0, and
    sum(weights * dweights). A first walk over the keys finds them, a second one the gradient.
    """
    at, exist, t = blocks_at(sizes, ROW_BLOCKS, ROWS, GROUP, INDEX)
    is_query = t < sizes.frames
    q_tile, q_low = load_queries(q, at, exist, t, rotary, sizes, D, STARTS, WIDTHS, PAIRS, HALF, ALIGN)
    grad_tile = load(grad, rows_at(at, t, grad, ALIGN), exist & is_query, D, STARTS, WIDTHS)
    maxima = tl.full((GROUP, ROWS, 1), float("-inf"), tl.float32)
    sums = tl.zeros((GROUP, ROWS, 1), tl.float32)
    delta = tl.zeros((GROUP, ROWS, 1), tl.float32)
    for block in range(KEY_BLOCKS):
        c = block * KEYS + tl.arange(0, KEYS)[None, :, None]
        k_tile, k_low, v_tile = load_keys(k, v, at, exist, c, rotary, sizes, D, STARTS, WIDTHS, PAIRS, HALF, ALIGN)
        scores = inner_products(q_tile, q_low, k_tile, k_low, PRECISION) * scale
        scores = attended(scores, at, t, transposed(c), exist, sizes, terms, CAUSAL, HEADS_INNER)
        larger = tl.maximum(maxima, tl.max(scores, 2)[:, :, None])
        kept = exp_from(maxima, larger)
        weights = exp_from(scores, larger)
        sums = sums * kept + tl.sum(weights, 2)[:, :, None]
        dweights = inner_products(grad_tile, (), v_tile, (), PRECISION)
        delta = delta * kept + tl.sum(weights * dweights, 2)[:, :, None]
        maxima = larger
    logsum = tl.where(sums == 0.0, float("inf"), maxima + tl.log(sums))
    delta *= inverse_of(sums)
    statistics_ptrs = statistics.ptr + rows_at(at, t, statistics, 1)
    tl.store(statistics_ptrs, logsum, mask=exist & is_query)
    tl.store(statistics_ptrs + 1, delta, mask=exist & is_query)

    sums_dq = zeros_of(GROUP, ROWS, WIDTHS)
    for block in range(KEY_BLOCKS):
        c = block * KEYS + tl.arange(0, KEYS)[None, :, None]
        k_tile, k_low, v_tile = load_keys(k, v, at, exist, c, rotary, sizes, D, STARTS, WIDTHS, PAIRS, HALF, ALIGN)
        _weights, dscores = weights_and_dscores(
            q_tile, q_low, k_tile, k_low, v_tile, grad_tile, at, exist, t, c, logsum, delta, terms, sizes, scale,
            CAUSAL, HEADS_INNER, PRECISION,
        )  # fmt: skip
        # A row of dscores sums to 0: where keys are alike, dq is what its rounding leaves. So both halves count.
        dscores, dscores_low = halved(dscores * scale, q.ptr.dtype.element_ty)
        sums_dq = add_products(sums_dq, dscores, k_tile, PRECISION)
        for j in tl.static_range(len(dscores_low)):
            sums_dq = add_products(sums_dq, dscores_low[j], k_tile, PRECISION)
    dq_rows = rows_at(at, t, dq, ALIGN)
    for i in tl.static_range(len(WIDTHS)):
        store_turned_part(
            dq, dq_rows, exist & is_query, sums_dq[i], rotary, t, is_query, D, STARTS[i], WIDTHS[i], PAIRS, HALF
        )


@triton.jit
def weights_and_dscores(
    q_tile, q_low, k_tile, k_low, v_tile, grad_tile, at, exist, t, c, logsum, delta, terms, sizes, scale,
    CAUSAL: tl.constexpr, HEADS_INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights and gradients of the biased scores (GROUP, ROWS, KEYS) of a block, from its queries' statistics."""
    scores = inner_products(q_tile, q_low, k_tile, k_low, PRECISION) * scale
    scores = attended(scores, at, t, transposed(c), exist, sizes, terms, CAUSAL, HEADS_INNER)
    weights = exp_from(scores, logsum)
    return weights, weights * (inner_products(grad_tile, (), v_tile, (), PRECISION) - delta)


@triton.jit
def load_statistics(statistics, at, exist, t, sizes):
    """Both statistics (GROUP, ROWS, 1) of queries t; those of no query weigh nothing."""
    ptrs = statistics.ptr + rows_at(at, t, statistics, 1)
    keep = exist & (t < sizes.frames)
    return tl.load(ptrs, mask=keep, other=float("inf")), tl.load(ptrs + 1, mask=keep, other=0.0)


@triton.jit
def temporal_attention_long_bwd_keys_kernel(
    grad, q, k, v, dk, dv, statistics, rotary, terms, sizes, scale,
    D: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
    CAUSAL: tl.constexpr, HEADS_INNER: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, INDEX: tl.constexpr,
    ROW_BLOCKS: tl.constexpr, KEY_BLOCKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys of GROUP sequences, from all of their queries."""
    NARROW: tl.constexpr = q.ptr.dtype.element_ty
    at, exist, c = blocks_at(sizes, KEY_BLOCKS, KEYS, GROUP, INDEX)
    k_tile, k_low, v_tile = load_keys(k, v, at, exist, c, rotary, sizes, D, STARTS, WIDTHS, PAIRS, HALF, ALIGN)
    sums_dk, sums_dv = zeros_of(GROUP, KEYS, WIDTHS), zeros_of(GROUP, KEYS, WIDTHS)
    for block in range(ROW_BLOCKS):
        t = block * ROWS + tl.arange(0, ROWS)[None, :, None]
        q_tile, q_low = load_queries(q, at, exist, t, rotary, sizes, D, STARTS, WIDTHS, PAIRS, HALF, ALIGN)
        grad_tile = load(grad, rows_at(at, t, grad, ALIGN), exist & (t < sizes.frames), D, STARTS, WIDTHS)
        logsum, delta = load_statistics(statistics, at, exist, t, sizes)
        weights, dscores = weights_and_dscores(
            q_tile, q_low, k_tile, k_low, v_tile, grad_tile, at, exist, t, c, logsum, delta, terms, sizes, scale,
            CAUSAL, HEADS_INNER, PRECISION,
        )  # fmt: skip
        sums_dv = add_products(sums_dv, transposed(narrow(weights, NARROW)), grad_tile, PRECISION)
        sums_dk = add_products(sums_dk, transposed(narrow(dscores * scale, NARROW)), q_tile, PRECISION)
    dk_rows, dv_rows = rows_at(at, c, dk, ALIGN), rows_at(at, c, dv, ALIGN)
    is_key = c < sizes.keys
    key_row = c if rotary is None else c + rotary.k_offset
    for i in tl.static_range(len(WIDTHS)):
        store_part(dv, dv_rows, exist & is_key, sums_dv[i], D, STARTS[i], WIDTHS[i])
        store_turned_part(
            dk, dk_rows, exist & is_key, sums_dk[i], rotary, key_row, is_key, D, STARTS[i], WIDTHS[i], PAIRS, HALF
        )


@triton.jit
def temporal_attention_long_bwd_bias_kernel(
    grad, q, k, v, dbias_ptr, statistics, rotary, terms, sizes, scale, heads,
    D: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
    CAUSAL: tl.constexpr, HEADS_INNER: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, INDEX: tl.constexpr,
    ROW_BLOCKS: tl.constexpr, KEY_BLOCKS: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A block of the scores' gradients of one head, summed over STEPS groups of its sequences.

    Into dbias (slots, heads, T, Tk); `sizes` count the sequences of one head (outer = 1).
    """
    program = tl.program_id(0).to(INDEX)
    row_block, key_block = program % ROW_BLOCKS, program // ROW_BLOCKS % KEY_BLOCKS
    program = program // (ROW_BLOCKS * KEY_BLOCKS)
    slot, head = program // heads, program % heads
    t = (row_block * ROWS).to(tl.int32) + tl.arange(0, ROWS)[None, :, None]
    c = (key_block * KEYS).to(tl.int32) + tl.arange(0, KEYS)[None, :, None]
    summed = tl.zeros((GROUP, ROWS, KEYS), tl.float32)
    for step in range(STEPS):
        place, exist = sequences_at((slot * STEPS + step) * GROUP, sizes, GROUP, INDEX)
        at = (place[0], place[1] + head, place[2])
        q_tile, q_low = load_queries(q, at, exist, t, rotary, sizes, D, STARTS, WIDTHS, PAIRS, HALF, ALIGN)
        k_tile, k_low, v_tile = load_keys(k, v, at, exist, c, rotary, sizes, D, STARTS, WIDTHS, PAIRS, HALF, ALIGN)
        grad_tile = load(grad, rows_at(at, t, grad, ALIGN), exist & (t < sizes.frames), D, STARTS, WIDTHS)
        logsum, delta = load_statistics(statistics, at, exist, t, sizes)
        _weights, dscores = weights_and_dscores(
            q_tile, q_low, k_tile, k_low, v_tile, grad_tile, at, exist, t, c, logsum, delta, terms, sizes, scale,
            CAUSAL, HEADS_INNER, PRECISION,
        )  # fmt: skip
        summed += dscores
    row = row_block * ROWS + tl.arange(0, ROWS)[:, None]
    column = key_block * KEYS + tl.arange(0, KEYS)[None, :]
    ptrs = dbias_ptr + (program * (sizes.frames * sizes.keys) + row * sizes.keys + column)
    tl.store(ptrs, tl.sum(summed, 0), mask=(row < sizes.frames) & (column < sizes.keys))
