"""Tiles of temporal attention: where the rows of some sequences lie, how they are read, turned, scored and written.

A tile is (GROUP, ROWS, COLUMNS): the frames of GROUP sequences padded to a power of two, never several sequences in one
row of a dot: what is not finite in one sequence cannot reach another, and no product is computed to be masked away.
The head dimension is a tuple of column parts, each a power of two of 16 or more (40 = 32 + 8 of 16, 160 = 128 + 32), so
that odd head dimensions cost little padding. Products over it are sums over the parts.

Rotary positions turn neighbouring columns in registers: `half` style is read with its partners already side by side,
which no score notices. A turned row is kept as two narrow tiles, high + low: scores then lose nothing against a
float32 rotation, for two more dots in a kernel that waits for memory.

Kernels take their tensors as `View`s, and what else a call has as `Sizes`, `Rotary` and `Terms`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import dot, narrow


class View(NamedTuple):
    """A tensor and its strides, in elements: (batch, outer, inner, frame, column) where it has rows of a sequence."""

    ptr: Any
    strides: tuple[int, ...]


class Sizes(NamedTuple):
    """Sequences = batch * outer * inner, which are heads and positions, neighbours in memory innermost."""

    sequences: int
    outer: int
    inner: int
    frames: int
    keys: int


class Rotary(NamedTuple):
    """Tables (L, pairs), and the row of the first key."""

    cos: View
    sin: View
    k_offset: int


class Terms(NamedTuple):
    """What meets the scores: bias (heads, T, Tk) and mask (B, T, Tk) in bytes, either of them None."""

    bias: View | None
    mask: View | None


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sequences_at(first, sizes, GROUP: tl.constexpr, INDEX: tl.constexpr):
    """(batch, outer, inner) coordinates of GROUP sequences from `first` on, and which of them exist; (GROUP, 1, 1)."""
    ids = first + tl.arange(0, GROUP)[:, None, None].to(INDEX)
    inner = sizes.inner
    return (ids // inner // sizes.outer, ids // inner % sizes.outer, ids % inner), ids < sizes.sequences


@triton.jit
def rows_at(at, t, x, ALIGN: tl.constexpr):
    """Offsets (GROUP, ROWS, 1) of the rows of frames t in the view x.

    ALIGN divides all but the last stride: Triton knows of multiples of 16 by itself, not of head dimensions like 40.
    """
    offsets = at[0] * x.strides[0] + at[1] * x.strides[1] + at[2] * x.strides[2] + t.to(at[0].dtype) * x.strides[3]
    if ALIGN > 1:
        offsets = tl.multiple_of(offsets, [ALIGN, ALIGN, ALIGN])
    return offsets


@triton.jit
def part_of(x, rows, keep, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers and mask of columns START .. START + WIDTH."""
    d = START + tl.arange(0, WIDTH)[None, None, :]
    if START + WIDTH > D:
        keep = keep & (d < D)
    return x.ptr + (rows + d.to(rows.dtype) * x.strides[4]), keep


@triton.jit
def halves_of(x, rows, keep, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr):
    """Pointers and masks of the first and of the second columns of the pairs that fill this part, in half style."""
    pair = START // 2 + tl.arange(0, WIDTH // 2)[None, None, :]
    if START + WIDTH <= 2 * PAIRS:
        first, second = pair, pair + PAIRS
    else:
        first = tl.where(pair < PAIRS, pair, 2 * pair)
        second = tl.where(pair < PAIRS, pair + PAIRS, 2 * pair + 1)
    first_ptrs = x.ptr + (rows + first.to(rows.dtype) * x.strides[4])
    second_ptrs = x.ptr + (rows + second.to(rows.dtype) * x.strides[4])
    return first_ptrs, keep & (first < D), second_ptrs, keep & (second < D)


@triton.jit
def load(x, rows, keep, D: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr):
    """Rows as a tuple of parts; zeros where `keep` is not."""
    parts = ()
    for i in tl.static_range(len(WIDTHS)):
        ptrs, inside = part_of(x, rows, keep, D, STARTS[i], WIDTHS[i])
        parts = parts + (tl.load(ptrs, mask=inside, other=0.0),)
    return parts


@triton.jit
def store_part(x, rows, keep, values, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Write a float32 part, rounded."""
    ptrs, inside = part_of(x, rows, keep, D, START, WIDTH)
    tl.store(ptrs, narrow(values, x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def turn(a, b, rotary, at_row, exist, D: tl.constexpr, START: tl.constexpr, PAIRS: tl.constexpr, BACK: tl.constexpr):
    """Pairs (a, b) of float32 columns from START on, turned by the angles of table rows `at_row` (1, ROWS, 1)."""
    pair = START // 2 + tl.arange(0, a.shape[2])[None, None, :]
    inside = exist & (pair < PAIRS)
    cos = tl.load(rotary.cos.ptr + (at_row * rotary.cos.strides[0] + pair * rotary.cos.strides[1]), inside, 1.0)
    sin = tl.load(rotary.sin.ptr + (at_row * rotary.sin.strides[0] + pair * rotary.sin.strides[1]), inside, 0.0)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    if BACK:
        sin = -sin
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
    if 2 * PAIRS < D:
        # Past the pairs 0 * inf would make a NaN of what nobody turns.
        turned_a, turned_b = tl.where(inside, turned_a, a), tl.where(inside, turned_b, b)
    return turned_a, turned_b


@triton.jit
def halved(x, NARROW: tl.constexpr):
    """float32 x as narrow high + low; a tuple of the low one, empty where NARROW is float32 itself."""
    high, low = narrow(x, NARROW), ()
    if NARROW != tl.float32:
        low = (narrow(x - high.to(tl.float32), NARROW),)
    return high, low


@triton.jit
def load_turned_part(
    x, rows, keep, rotary, at_row, exist, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A part in float32, its pairs turned by the angles of table rows `at_row`."""
    if HALF:
        first_ptrs, first_keep, second_ptrs, second_keep = halves_of(x, rows, keep, D, START, WIDTH, PAIRS)
        a = tl.load(first_ptrs, mask=first_keep, other=0.0)
        b = tl.load(second_ptrs, mask=second_keep, other=0.0)
    else:
        ptrs, inside = part_of(x, rows, keep, D, START, WIDTH)
        both = tl.load(ptrs, mask=inside, other=0.0)
        a, b = tl.split(tl.reshape(both, (both.shape[0], both.shape[1], WIDTH // 2, 2)))
    a, b = turn(a.to(tl.float32), b.to(tl.float32), rotary, at_row, exist, D, START, PAIRS, False)
    return tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1], WIDTH))


@triton.jit
def load_turned(
    x, rows, keep, rotary, at_row, exist, D: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rows turned by the angles of table rows `at_row`: high parts, and low ones (none in float32, none unturned)."""
    NARROW: tl.constexpr = x.ptr.dtype.element_ty
    high, low = (), ()
    if PAIRS == 0:
        high = load(x, rows, keep, D, STARTS, WIDTHS)
    else:
        for i in tl.static_range(len(WIDTHS)):
            wide = load_turned_part(x, rows, keep, rotary, at_row, exist, D, STARTS[i], WIDTHS[i], PAIRS, HALF)
            high_part, low_part = halved(wide, NARROW)
            high, low = high + (high_part,), low + low_part
    return high, low


@triton.jit
def store_turned_part(
    x, rows, keep, values, rotary, at_row, exist, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Write a part of a gradient of turned rows, turned back."""
    NARROW: tl.constexpr = x.ptr.dtype.element_ty
    if PAIRS == 0:
        store_part(x, rows, keep, values, D, START, WIDTH)
    else:
        a, b = tl.split(tl.reshape(values, (values.shape[0], values.shape[1], WIDTH // 2, 2)))
        a, b = turn(a, b, rotary, at_row, exist, D, START, PAIRS, True)
        if HALF:
            first_ptrs, first_keep, second_ptrs, second_keep = halves_of(x, rows, keep, D, START, WIDTH, PAIRS)
            tl.store(first_ptrs, narrow(a, NARROW), mask=first_keep)
            tl.store(second_ptrs, narrow(b, NARROW), mask=second_keep)
        else:
            store_part(x, rows, keep, tl.reshape(tl.join(a, b), values.shape), D, START, WIDTH)


@triton.jit
def flat(x):
    """(ROWS, COLUMNS) of a tile of one sequence."""
    return tl.reshape(x, (x.shape[1], x.shape[2]))


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b for each sequence; one sequence alone takes the 2-D dot, whose warps share its rows."""
    if a.shape[0] == 1:
        return tl.reshape(dot(flat(a), flat(b), PRECISION), (1, a.shape[1], b.shape[2]))
    else:
        return dot(a, b, PRECISION)


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a @ b, as `product`, in the accumulators of the dot."""
    if a.shape[0] == 1:
        return tl.reshape(flat(total) + dot(flat(a), flat(b), PRECISION), total.shape)
    else:
        return total + dot(a, b, PRECISION)


@triton.jit
def transposed(x):
    """(GROUP, COLUMNS, ROWS)."""
    return tl.permute(x, (0, 2, 1))


@triton.jit
def inner_products(a, a_low, b, b_low, PRECISION: tl.constexpr):
    """(GROUP, ROWS, KEYS) products of rows, summed over their parts; low parts are none or go with every part."""
    total = product(a[0], transposed(b[0]), PRECISION)
    for i in tl.static_range(1, len(a)):
        total = add_product(total, a[i], transposed(b[i]), PRECISION)
    for i in tl.static_range(len(a_low)):
        total = add_product(total, a_low[i], transposed(b[i]), PRECISION)
        total = add_product(total, a[i], transposed(b_low[i]), PRECISION)
    return total


@triton.jit
def attended(scores, at, t, c, exist, sizes, terms, CAUSAL: tl.constexpr, HEADS_INNER: tl.constexpr):
    """Scaled scores of queries t (1, ROWS, 1) and keys c (1, 1, KEYS) plus the bias; -inf where not attended to."""
    allowed = exist & (t < sizes.frames) & (c < sizes.keys)
    if terms.bias is not None:
        head = at[2] if HEADS_INNER else at[1]
        strides = terms.bias.strides
        bias = tl.load(terms.bias.ptr + (head * strides[0] + t * strides[1] + c * strides[2]), mask=allowed, other=0.0)
        scores += bias.to(tl.float32)
    if CAUSAL:
        allowed = allowed & (c <= t)
    if terms.mask is not None:
        strides = terms.mask.strides
        mask = tl.load(terms.mask.ptr + (at[0] * strides[0] + t * strides[1] + c * strides[2]), mask=allowed, other=0)
        allowed = allowed & (mask != 0)
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def exp_from(scores, maxima):
    """exp(scores - maxima); 0 where a row attends to nothing, whose maximum is -inf."""
    return tl.exp2((scores - tl.where(maxima == float("-inf"), 0.0, maxima)) * LOG2E)


@triton.jit
def inverse_of(sums):
    """1 / sums, and 1 for rows that attend to nothing, whose weights are 0."""
    return 1.0 / tl.where(sums == 0.0, 1.0, sums)
