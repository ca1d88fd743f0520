"""What the temporal attention block's kernels do with one tile: `UNITS` units of `FRAMES_PADDED` rows each.

A unit holds `PER_UNIT` whole positions of T frames and rows that stand for nothing. Rows are (unit, row of the unit) in
this order; a tile never leaves its batch entry. Attention works on (head, unit) pairs, so no dot and no exponential is
spent on two frames of different units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import dot, narrow

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_rows(tile, positions, T: tl.constexpr, UNITS: tl.constexpr, TP: tl.constexpr, PER_UNIT: tl.constexpr):
    """Position and frame of every row (UNITS, TP, 1) of a tile, and whether it stands for one."""
    unit = tile * UNITS + tl.arange(0, UNITS)[:, None, None]
    row = tl.arange(0, TP)[None, :, None]
    if PER_UNIT == 1:
        position = unit + row * 0
        frame = row + unit * 0
    else:
        position = unit * PER_UNIT + row // T
        frame = row % T + unit * 0
    return position, frame, (row < PER_UNIT * T) & (position < positions)


@triton.jit
def load_rows(ptr, offsets, valid, stride_c, first, C: tl.constexpr, WIDTH: tl.constexpr):
    """Channels first .. first + WIDTH of a tile's rows as float32 (rows, WIDTH); zeros where there is nothing."""
    channel = first + tl.arange(0, WIDTH)[None, None, :]
    values = tl.load(ptr + offsets + channel.to(tl.int64) * stride_c, valid & (channel < C), 0.0)
    return tl.reshape(values, [values.shape[0] * values.shape[1], WIDTH]).to(tl.float32)


@triton.jit
def load_rows_again(ptr, offsets, valid, stride_c, first, C: tl.constexpr, WIDTH: tl.constexpr):
    """`load_rows` for the last time: a policy of its own keeps the compiler from holding on to the first reading."""
    channel = first + tl.arange(0, WIDTH)[None, None, :]
    values = tl.load(ptr + offsets + channel.to(tl.int64) * stride_c, valid & (channel < C), 0.0,
                     eviction_policy="evict_first")  # fmt: skip
    return tl.reshape(values, [values.shape[0] * values.shape[1], WIDTH]).to(tl.float32)


@triton.jit
def store_rows(ptr, offsets, valid, stride_c, first, values, C: tl.constexpr, WIDTH: tl.constexpr):
    """Store float32 (rows, WIDTH) as channels first .. first + WIDTH of a tile's rows."""
    channel = first + tl.arange(0, WIDTH)[None, None, :]
    values = tl.reshape(narrow(values, ptr.dtype.element_ty), [offsets.shape[0], offsets.shape[1], WIDTH])
    tl.store(ptr + offsets + channel.to(tl.int64) * stride_c, values, valid & (channel < C))


@triton.jit
def load_vector(ptr, index, valid, other: tl.constexpr):
    """float32 values of a parameter."""
    return tl.load(ptr + index, valid, other).to(tl.float32)


@triton.jit
def _merged(x, mean, square, FIRST: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    """Mean and centred sum of squares of FIRST channels (rows, 1) and of the chunk x that follows them."""
    COUNT: tl.constexpr = min(CHUNK, C - FIRST)
    here = tl.sum(x, 1, keep_dims=True) / COUNT
    away = x - here
    if COUNT < CHUNK:
        away = tl.where(tl.arange(0, CHUNK)[None, :] < COUNT, away, 0.0)
    within = tl.sum(away * away, 1, keep_dims=True)
    if FIRST == 0:
        return here, within
    apart = here - mean
    within += square + apart * apart * (FIRST * COUNT / (FIRST + COUNT))
    return mean + apart * (COUNT / (FIRST + COUNT)), within


@triton.jit
def norm_statistics(
    x_ptr, offsets, valid, stride_c, eps, NORM: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr
):
    """Mean and reciprocal deviation (rows, 1) of every row over C; chunks are merged by Chan's formula."""
    mean = tl.zeros([ROWS, 1], tl.float32)
    square = tl.zeros([ROWS, 1], tl.float32)
    if NORM == 0:
        return mean, square + 1.0
    for first in tl.static_range(0, C, CHUNK):
        x = load_rows(x_ptr, offsets, valid, stride_c, first, C, CHUNK)
        if NORM == 2:
            square += tl.sum(x * x, 1, keep_dims=True)
        else:
            mean, square = _merged(x, mean, square, first, C, CHUNK)
    return mean, 1.0 / tl.sqrt_rn(square / C + eps)


@triton.jit
def normalised(
    x, mean, deviation, frame, valid, norm_weight_ptr, norm_bias_ptr, embedding_ptr, first,
    C: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """norm(x) + frame_embedding of float32 (rows, WIDTH) channels in DTYPE; zeros in rows that stand for nothing."""
    ROWS: tl.constexpr = x.shape[0]
    channel = first + tl.arange(0, WIDTH)
    inside = channel < C
    h = (x - mean) * deviation
    if norm_weight_ptr is not None:
        h *= load_vector(norm_weight_ptr, channel, inside, 0.0)[None, :]
    if norm_bias_ptr is not None:
        h += load_vector(norm_bias_ptr, channel, inside, 0.0)[None, :]
    if embedding_ptr is not None:
        index = frame * C + channel[None, None, :]
        embedding = load_vector(embedding_ptr, index, valid & inside[None, None, :], 0.0)
        h += tl.reshape(embedding, [ROWS, WIDTH])
    # 0 * infinity (a row of zeros with eps = 0) must not reach the rows of the same unit, nor a channel past the last.
    keep = tl.reshape(valid, [ROWS, 1]) & inside[None, :]
    return narrow(tl.where(keep, h, 0.0), DTYPE)


@triton.jit
def head_columns(group, HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, DP: tl.constexpr,
                 PAIRS: tl.constexpr):  # fmt: skip
    """For the GROUP * DP columns of a group of heads: each one's place among heads*D, and whether it has one.

    With PAIRS > 0 (rotary in halves) dimensions i and i + PAIRS become neighbours: a permutation of q's and k's columns
    leaves their products as they are, and turns one rotary style into the other.
    """
    column = tl.arange(0, GROUP * DP)
    head = group * GROUP + column // DP
    dim = column % DP
    valid = (head < HEADS) & (dim < D)
    if PAIRS > 0:
        dim = tl.where(dim < 2 * PAIRS, dim // 2 + dim % 2 * PAIRS, dim)
    return head * D + dim, valid


@triton.jit
def load_weight(ptr, row, row_valid, stride, first, C: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """Columns first .. first + WIDTH of the given rows of a (rows, C) weight, in DTYPE."""
    column = first + tl.arange(0, WIDTH)[None, :]
    weight = tl.load(ptr + row.to(tl.int64)[:, None] * stride + column, row_valid[:, None] & (column < C), 0.0)
    return weight if weight.dtype == DTYPE else narrow(weight.to(tl.float32), DTYPE)


@triton.jit
def load_out_weight(
    ptr, column, column_valid, stride, first, C: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr
):
    """Rows first .. first + WIDTH of the given columns of the (C, heads*D) output weight, in DTYPE."""
    row = first + tl.arange(0, WIDTH)[:, None]
    weight = tl.load(ptr + row.to(tl.int64) * stride + column[None, :], column_valid[None, :] & (row < C), 0.0)
    return weight if weight.dtype == DTYPE else narrow(weight.to(tl.float32), DTYPE)


@triton.jit
def heads_apart(x, UNITS: tl.constexpr, TP: tl.constexpr, GROUP: tl.constexpr, DP: tl.constexpr):
    """(UNITS*TP, GROUP*DP) as (GROUP*UNITS, TP, DP): the order in which a warp keeps the rows that it computed."""
    return tl.reshape(tl.permute(tl.reshape(x, [UNITS, TP, GROUP, DP]), [2, 0, 1, 3]), [GROUP * UNITS, TP, DP])


@triton.jit
def heads_together(x, UNITS: tl.constexpr, TP: tl.constexpr, GROUP: tl.constexpr, DP: tl.constexpr):
    """The inverse of `heads_apart`."""
    return tl.reshape(tl.permute(tl.reshape(x, [GROUP, UNITS, TP, DP]), [1, 2, 0, 3]), [UNITS * TP, GROUP * DP])


@triton.jit
def rotary_tables(cos_ptr, sin_ptr, T: tl.constexpr, TP: tl.constexpr, DP: tl.constexpr, PAIRS: tl.constexpr):
    """Cosines and sines (1, TP, DP/2) of the rows of a unit; 1 and 0 past the rotated dimensions."""
    frame = (tl.arange(0, TP) % T)[None, :, None]
    pair = tl.arange(0, DP // 2)[None, None, :]
    cos = tl.load(cos_ptr + frame * PAIRS + pair, pair < PAIRS, 1.0).to(tl.float32)
    return cos, tl.load(sin_ptr + frame * PAIRS + pair, pair < PAIRS, 0.0).to(tl.float32)


@triton.jit
def turned(x, cos, sin):
    """Neighbouring dimensions of float32 x (.., TP, DP) turned by the tables' angles; by their opposites with -sin."""
    a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), x.shape)


@triton.jit
def operand(
    x, bias_ptr, column, column_valid, cos, sin, DTYPE: tl.constexpr, UNITS: tl.constexpr, TP: tl.constexpr,
    GROUP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """A float32 projection (rows, GROUP * DP) as an operand of attention: bias, heads apart, rotary, rounded."""
    if bias_ptr is not None:
        x += narrow(load_vector(bias_ptr, column, column_valid, 0.0), DTYPE).to(tl.float32)[None, :]
    x = heads_apart(x, UNITS, TP, GROUP, DP)
    if cos is not None:
        x = turned(x, cos, sin)
    return narrow(x, DTYPE)


@triton.jit
def projected(
    group, x_ptr, x_rows, valid, stride_xc, mean, deviation, frame, norm_weight_ptr, norm_bias_ptr, embedding_ptr,
    q_weight_ptr, k_weight_ptr, v_weight_ptr, stride_q, stride_k, stride_v, q_bias_ptr, k_bias_ptr, v_bias_ptr, cos,
    sin, HEADS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, UNITS: tl.constexpr, TP: tl.constexpr,
    GROUP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """q, k, v of a group of heads as operands of attention, x normalised again chunk by chunk."""
    turned_row, row_valid = head_columns(group, HEADS, D, GROUP, DP, PAIRS if HALF else 0)
    row, row_valid = head_columns(group, HEADS, D, GROUP, DP, 0)
    q = tl.zeros([UNITS * TP, GROUP * DP], tl.float32)
    k = tl.zeros([UNITS * TP, GROUP * DP], tl.float32)
    v = tl.zeros([UNITS * TP, GROUP * DP], tl.float32)
    for first in tl.range(0, C, CHUNK):
        x = load_rows(x_ptr, x_rows, valid, stride_xc, first, C, CHUNK)
        h = normalised(x, mean, deviation, frame, valid, norm_weight_ptr, norm_bias_ptr, embedding_ptr, first, C, CHUNK,
                       DTYPE)  # fmt: skip
        q += dot(h, tl.trans(load_weight(q_weight_ptr, turned_row, row_valid, stride_q, first, C, CHUNK, DTYPE)),
                 PRECISION)  # fmt: skip
        k += dot(h, tl.trans(load_weight(k_weight_ptr, turned_row, row_valid, stride_k, first, C, CHUNK, DTYPE)),
                 PRECISION)  # fmt: skip
        v += dot(h, tl.trans(load_weight(v_weight_ptr, row, row_valid, stride_v, first, C, CHUNK, DTYPE)), PRECISION)
    q = operand(q, q_bias_ptr, turned_row, row_valid, cos, sin, DTYPE, UNITS, TP, GROUP, DP)
    k = operand(k, k_bias_ptr, turned_row, row_valid, cos, sin, DTYPE, UNITS, TP, GROUP, DP)
    return q, k, operand(v, v_bias_ptr, row, row_valid, None, None, DTYPE, UNITS, TP, GROUP, DP)


@triton.jit
def projected_whole(
    h, q_weight, k_weight, v_weight, group, q_bias_ptr, k_bias_ptr, v_bias_ptr, cos, sin, HEADS: tl.constexpr,
    D: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, UNITS: tl.constexpr,
    TP: tl.constexpr, GROUP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The same from h (rows, C) and the group's weights; each is rounded before the next, which saves registers."""
    turned_row, row_valid = head_columns(group, HEADS, D, GROUP, DP, PAIRS if HALF else 0)
    row, row_valid = head_columns(group, HEADS, D, GROUP, DP, 0)
    q = dot(h, tl.trans(q_weight), PRECISION)
    q = operand(q, q_bias_ptr, turned_row, row_valid, cos, sin, h.dtype, UNITS, TP, GROUP, DP)
    k = dot(h, tl.trans(k_weight), PRECISION)
    k = operand(k, k_bias_ptr, turned_row, row_valid, cos, sin, h.dtype, UNITS, TP, GROUP, DP)
    v = dot(h, tl.trans(v_weight), PRECISION)
    return q, k, operand(v, v_bias_ptr, row, row_valid, None, None, h.dtype, UNITS, TP, GROUP, DP)


@triton.jit
def group_weights(
    group, q_weight_ptr, k_weight_ptr, v_weight_ptr, stride_q, stride_k, stride_v, HEADS: tl.constexpr,
    D: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    DTYPE: tl.constexpr, GROUP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """A group's rows (GROUP * DP, C) of q_weight, k_weight and v_weight in DTYPE."""
    turned_row, row_valid = head_columns(group, HEADS, D, GROUP, DP, PAIRS if HALF else 0)
    row, row_valid = head_columns(group, HEADS, D, GROUP, DP, 0)
    q_weight = load_weight(q_weight_ptr, turned_row, row_valid, stride_q, 0, C, WIDTH, DTYPE)
    k_weight = load_weight(k_weight_ptr, turned_row, row_valid, stride_k, 0, C, WIDTH, DTYPE)
    return q_weight, k_weight, load_weight(v_weight_ptr, row, row_valid, stride_v, 0, C, WIDTH, DTYPE)


@triton.jit
def allowed_pairs(
    mask_ptr, batch, MASK_ROWS: tl.constexpr, IS_CAUSAL: tl.constexpr, T: tl.constexpr, TP: tl.constexpr,
    PER_UNIT: tl.constexpr,
):  # fmt: skip
    """Whether row i of a unit may attend to row j: (1, TP, TP)."""
    i = tl.arange(0, TP)[None, :, None]
    j = tl.arange(0, TP)[None, None, :]
    allowed = (i < PER_UNIT * T) & (j < PER_UNIT * T)
    if PER_UNIT > 1:
        allowed = allowed & (i // T == j // T)
    if IS_CAUSAL:
        allowed = allowed & (j <= i)
    if MASK_ROWS > 0:
        row = i % T if MASK_ROWS > 1 else i * 0
        index = (batch * MASK_ROWS + row) * T + j % T
        allowed = allowed & (tl.load(mask_ptr + index, allowed, 0) != 0)
    return allowed


@triton.jit
def load_scores_bias(ptr, group, HEADS: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr,
                     T: tl.constexpr, TP: tl.constexpr):  # fmt: skip
    """attn_bias of a group of heads, float32 (GROUP*UNITS, TP, TP)."""
    head = group * GROUP + tl.arange(0, GROUP)[:, None, None]
    i = (tl.arange(0, TP) % T)[None, :, None]
    j = (tl.arange(0, TP) % T)[None, None, :]
    # Heads and pairs that are none read something of the bias: it is masked, or multiplied by rows of zeros, later.
    bias = tl.load(ptr + (tl.minimum(head, HEADS - 1) * T + i) * T + j).to(tl.float32)
    bias = tl.broadcast_to(bias[:, None, :, :], [GROUP, UNITS, TP, TP])
    return tl.reshape(bias, [GROUP * UNITS, TP, TP])


@triton.jit
def batched_dot(a, b, PRECISION: tl.constexpr):
    """`dot` of 3-D a and b; a batch of one as 2-D, which every warp shares in instead of repeating it."""
    if a.shape[0] == 1:
        flat_a = tl.reshape(a, [a.shape[1], a.shape[2]])
        flat_b = tl.reshape(b, [b.shape[1], b.shape[2]])
        product = tl.reshape(dot(flat_a, flat_b, PRECISION), [1, a.shape[1], b.shape[2]])
    else:
        product = dot(a, b, PRECISION)
    return product


@triton.jit
def softmax_rows(scores, allowed, bias, scale):
    """exp(scores - their row's largest), and its row's sum: 0 and 1 for a row with no pair allowed."""
    scores *= scale
    if bias is not None:
        scores += bias
    if allowed is not None:
        scores = tl.where(allowed, scores, float("-inf"))
    largest = tl.max(scores, 2, keep_dims=True)
    if allowed is not None:
        largest = tl.where(largest == float("-inf"), 0.0, largest)
    # The difference first: of a product with log2(e) the rounding error would grow with the score.
    weights = tl.exp2((scores - largest) * LOG2_E)
    total = tl.sum(weights, 2, keep_dims=True)
    if allowed is not None:
        total = tl.where(total == 0.0, 1.0, total)
    return weights, total


@triton.jit
def contained(v, T: tl.constexpr, TP: tl.constexpr):
    """v with what is not finite replaced by 0, and (.., TP, 1) a NaN for the rows of the positions that lost some.

    A weight of 0 times an infinity is a NaN: with several positions in a unit it would reach the others.
    """
    wide = v.to(tl.float32)
    lost = tl.sum(wide * 0.0, 2)
    same = tl.arange(0, TP)[None, :, None] // T == tl.arange(0, TP)[None, None, :] // T
    return tl.where(wide * 0.0 == 0.0, v, 0.0), tl.sum(tl.where(same, lost[:, None, :], 0.0), 2, keep_dims=True)
