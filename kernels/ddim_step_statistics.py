"""ddim_step's statistics of a whole sample: the rescale of guidance and the dynamic threshold.

**Computes**
  factor = r std(c) / std(u + w (c - u)) + 1 - r;  limit = the ratio quantile of |x0|, between 1 and the maximum.

**Work split**
  A few programs for each multiprocessor, a share of one sample's tiles each; one program for each sample joins what
  they found. Rescale: means and centred squares, merged by Chan's formula in a fixed order. Threshold: bits of
  non-negative floats sort as the floats do, and what lies below 1 or above the maximum need not be told apart, so two
  histograms of the bits between find the quantile exactly: the first over all of them, the second inside one bin of
  the first. Counts are integers: the order of their additions does not show.

**Traffic**
  Rescale: c and u once. Threshold: x, c and u twice; once where the maximum is 1 or where the first histogram shows
  that the quantile lies below 1 or above the maximum. An atomic addition in L2 for each element between those.

**Precision**
  Sums of a tile in float32 around its own mean, joined in float64. The quantile is exact; the interpolation between
  neighbours float32, as the reference's. How many shares there are, and so the last bits of the deviations, depends
  on the number of multiprocessors; on one device the same input gives the same output.

**Resources** (sm_90, bfloat16; no spills)
  Registers: moments 64, factor 84, histogram 96 and 80, limit 96. Shared memory: 8 KB in the histograms, where bits
  are dealt out one to a lane for the atomics.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl

from . import launch
from .ddim_step_terms import alphas_of, coefficients, guidance_of_tile, guided, original_of
from .ddim_step_walk import PREDICTIONS, Step, Walk, configuration, shared_arguments, tiles_of

_ONE = tl.constexpr(0x3F800000)  # bits of 1.0
_INFINITY = tl.constexpr(0x7F800000)
_LAST = tl.constexpr(0x7FFFFFFF)
# Slots of a sample's counts before its bins: values below 1, bits of the greatest of them, of the greatest of all, and
# _LAST - bits of the least above the second histogram, so that zero is where every maximum starts.
_BELOW, _GREATEST_BELOW, _GREATEST, _LEAST_ABOVE, _HEAD = (tl.constexpr(i) for i in (0, 1, 2, 3, 16))
_SCAN = tl.constexpr(4096)  # bins summed at once
_PROGRAMS_PER_MULTIPROCESSOR = 8
_Optional = torch.Tensor | None


@triton.jit
def _moments(values, mask, n):
    """Mean and sum of centred squares of the n values under the mask, float64 scalars."""
    mean = tl.sum(tl.where(mask, values, 0.0), axis=0) / n
    centred = tl.where(mask, values - mean, 0.0)
    rest = tl.sum(centred, axis=0).to(tl.float64)  # what rounding the mean left
    squares = tl.sum(centred * centred, axis=0).to(tl.float64)
    return mean.to(tl.float64) + rest / n, squares - rest * rest / n


@triton.jit
def _merge(seen, mean, squares, n, tile_mean, tile_squares):
    """Chan's formula: what `seen` and n values together have."""
    delta = tile_mean - mean
    share = n / (seen + n)
    return mean + delta * share, squares + tile_squares + delta * delta * seen * share


@triton.jit
def ddim_step_moments_kernel(
    sample_ptr, output_ptr, uncond_ptr, alpha_t_ptr, alpha_prev_ptr, guidance_ptr,
    alpha_t: tl.float64, alpha_prev: tl.float64, guidance: tl.float32,
    stride_at, stride_ap, stride_gb, stride_gt, run, frames, elements,
    moments_ptr, shares, RUN_COVERS_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(count, mean and centred squares of c, mean and centred squares of the guided output) of a share's tiles."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(tl.cast(elements, tl.int64), BLOCK).to(tl.int32)
    b = (pid // shares).to(tl.int64)
    index = tl.arange(0, BLOCK)
    zero = tl.full((), 0.0, tl.float64)
    seen, mean_c, squares_c, mean_g, squares_g = zero, zero, zero, zero, zero
    tile = pid % shares
    while tile < tiles:
        first = tile.to(tl.int64) * BLOCK
        mask = index < elements - first
        n = tl.minimum(elements - first, BLOCK).to(tl.float32)
        offset = b * elements + first
        scale = guidance_of_tile(
            guidance_ptr, guidance, stride_gb, stride_gt, run, frames, b, first, index, RUN_COVERS_TILE
        )
        output = tl.load(output_ptr + offset + index, mask=mask, other=0.0).to(tl.float32)
        tile_mean, tile_squares = _moments(output, mask, n)
        mean_c, squares_c = _merge(seen, mean_c, squares_c, n, tile_mean, tile_squares)
        tile_mean, tile_squares = _moments(guided(output_ptr, uncond_ptr, offset, index, mask, scale), mask, n)
        mean_g, squares_g = _merge(seen, mean_g, squares_g, n, tile_mean, tile_squares)
        seen += n
        tile += shares
    to = moments_ptr + pid.to(tl.int64) * 5
    tl.store(to, seen)
    tl.store(to + 1, mean_c)
    tl.store(to + 2, squares_c)
    tl.store(to + 3, mean_g)
    tl.store(to + 4, squares_g)


@triton.jit
def _joined(moments_ptr, counts, which, mask, total):
    """Centred squares of all the shares together, of the statistic at `which`."""
    means = tl.load(moments_ptr + which, mask=mask, other=0.0)
    mean = tl.sum(counts * means, axis=0) / total
    delta = tl.where(mask, means - mean, 0.0)
    squares = tl.load(moments_ptr + which + 1, mask=mask, other=0.0)
    return tl.sum(squares + counts * delta * delta, axis=0)


@triton.jit
def ddim_step_factor_kernel(moments_ptr, factor_ptr, shares, rescale: tl.float32, BLOCK: tl.constexpr):
    """A sample's factor from the moments of its shares; the divisors of the unbiased deviations cancel."""
    b = tl.program_id(0).to(tl.int64)
    share = tl.arange(0, BLOCK)
    mask = share < shares
    moments_ptr += (b * shares + share) * 5
    counts = tl.load(moments_ptr, mask=mask, other=0.0)
    total = tl.sum(counts, axis=0)
    plain = _joined(moments_ptr, counts, 1, mask, total)
    ratio = tl.sqrt(plain / _joined(moments_ptr, counts, 3, mask, total))  # one value alone: 0 / 0, as torch.std
    tl.store(factor_ptr + b, (rescale * ratio + (1.0 - rescale)).to(tl.float32))


@triton.jit
def _find(counts_ptr, rank, BINS: tl.constexpr):
    """The bin that holds the value of this rank (BINS if none does), and how many values lie in the bins before."""
    CHUNK: tl.constexpr = min(BINS, _SCAN)
    index = tl.arange(0, CHUNK)
    found = tl.sum(index, axis=0) * 0
    seen = rank * 0
    before = seen
    for start in range(0, BINS, CHUNK):
        upto = seen + tl.cumsum(tl.load(counts_ptr + start + index), axis=0)
        passed = upto <= rank
        found += tl.sum(passed.to(tl.int32), axis=0)
        before = tl.maximum(before, tl.max(tl.where(passed, upto, 0), axis=0))
        seen = tl.max(upto, axis=0)
    return found, before


@triton.jit
def _window(counts_ptr, rank, COARSE: tl.constexpr, FINE_BITS: tl.constexpr):
    """The bits [start, end) that hold the value of this rank, and how many values lie below.

    Empty: at 1 for a rank among the values below, at _LAST for one above the maximum.
    """
    below = tl.load(counts_ptr + _BELOW)
    bin, before = _find(counts_ptr + _HEAD, rank - below, COARSE)
    start = _ONE + (bin << FINE_BITS)
    end = start + (1 << FINE_BITS)
    outside = tl.where(rank < below, _ONE, _LAST)
    inside = (rank >= below) & (bin < COARSE)
    return tl.where(inside, start, outside), tl.where(inside, end, outside), below + before


@triton.jit(do_not_specialize=["rank", "most"])
def ddim_step_histogram_kernel(
    sample_ptr, output_ptr, uncond_ptr, alpha_t_ptr, alpha_prev_ptr, guidance_ptr,
    alpha_t: tl.float64, alpha_prev: tl.float64, guidance: tl.float32,
    stride_at, stride_ap, stride_gb, stride_gt, run, frames, elements,
    factor_ptr, counts_ptr, shares, rank, most,
    PREDICTION: tl.constexpr, RUN_COVERS_TILE: tl.constexpr, SECOND: tl.constexpr, COARSE: tl.constexpr,
    FINE_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds a share's tiles to the first histogram of bits, or to the second, inside the bin of `rank` in the first."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(tl.cast(elements, tl.int64), BLOCK).to(tl.int32)
    b = (pid // shares).to(tl.int64)
    index = tl.arange(0, BLOCK)
    counts_ptr += b * (_HEAD + COARSE + (1 << FINE_BITS))
    start = tl.full((), _ONE, tl.int32)
    end = start
    last_tile = tiles
    if SECOND:
        rank = tl.cast(rank, counts_ptr.dtype.element_ty)
        start, end, _ = _window(counts_ptr, rank, COARSE, FINE_BITS)
        # Nothing to tell apart above the maximum, or where the next rank lies below 1 too.
        known = (start == _LAST) | (rank + 1 < tl.load(counts_ptr + _BELOW))
        last_tile = tl.where(known, 0, tiles)
    a, _ = alphas_of(alpha_t_ptr, alpha_prev_ptr, alpha_t, alpha_prev, stride_at, stride_ap, b)
    signal, spread, per_signal, _ = coefficients(a)
    factor = 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + b)
    below = tl.zeros((BLOCK,), tl.int32)
    greatest_below = below
    greatest = below
    tile = pid % shares
    while tile < last_tile:
        first = tile.to(tl.int64) * BLOCK
        mask = index < elements - first
        offset = b * elements + first
        scale = guidance_of_tile(
            guidance_ptr, guidance, stride_gb, stride_gt, run, frames, b, first, index, RUN_COVERS_TILE
        )
        x = tl.load(sample_ptr + offset + index, mask=mask, other=0.0).to(tl.float32)
        output = guided(output_ptr, uncond_ptr, offset, index, mask, scale)
        if factor_ptr is not None:
            output *= factor
        x0 = original_of(x, output, signal, spread, per_signal, PREDICTION)
        bits = x0.to(tl.int32, bitcast=True) & _LAST
        if SECOND:
            greatest = tl.maximum(greatest, tl.where(mask & (bits >= end), _LAST - bits, 0))
            inside = mask & (bits >= start) & (bits < end)
            tl.atomic_add(counts_ptr + (_HEAD + COARSE) + (bits - start), 1, mask=inside, sem="relaxed")
        else:
            small = mask & (bits < _ONE)
            below += small.to(tl.int32)
            greatest_below = tl.maximum(greatest_below, tl.where(small, bits, 0))
            greatest = tl.maximum(greatest, tl.where(mask, bits, 0))
            inside = mask & (bits >= _ONE) & (bits <= most)
            tl.atomic_add(counts_ptr + _HEAD + ((bits - _ONE) >> FINE_BITS), 1, mask=inside, sem="relaxed")
        tile += shares
    if SECOND:
        tl.atomic_max(counts_ptr + _LEAST_ABOVE, tl.max(greatest, axis=0), sem="relaxed")
    else:
        tl.atomic_add(counts_ptr + _BELOW, tl.sum(below, axis=0), sem="relaxed")
        tl.atomic_max(counts_ptr + _GREATEST_BELOW, tl.max(greatest_below, axis=0), sem="relaxed")
        tl.atomic_max(counts_ptr + _GREATEST, tl.max(greatest, axis=0), sem="relaxed")


@triton.jit
def _next_filled(counts_ptr, bin, BINS: tl.constexpr):
    """The first bin after `bin` with a value in it; BINS where there is none."""
    CHUNK: tl.constexpr = min(BINS, _SCAN)
    index = tl.arange(0, CHUNK)
    found = tl.sum(index, axis=0) * 0 + BINS
    for start in range(0, BINS, CHUNK):
        filled = (tl.load(counts_ptr + start + index) > 0) & (start + index > bin)
        found = tl.minimum(found, tl.min(tl.where(filled, start + index, BINS), axis=0))
    return found


@triton.jit(do_not_specialize=["rank"])
def ddim_step_limit_kernel(
    counts_ptr, limit_ptr, rank, elements, fraction: tl.float32, most: tl.float32,
    REFINED: tl.constexpr, COARSE: tl.constexpr, FINE_BITS: tl.constexpr,
):  # fmt: skip
    """A sample's limit from its two histograms; NaN where a value is. Not REFINED: the maximum is 1 or less."""
    FINE: tl.constexpr = 1 << FINE_BITS
    b = tl.program_id(0).to(tl.int64)
    counts_ptr += b * (_HEAD + COARSE + FINE)
    quantile = tl.full((), 1.0, tl.float32)
    if REFINED:
        rank = tl.cast(rank, counts_ptr.dtype.element_ty)
        start, _, before = _window(counts_ptr, rank, COARSE, FINE_BITS)
        fine_ptr = counts_ptr + (_HEAD + COARSE)
        bin, before_bin = _find(fine_ptr, rank - before, FINE)
        until = before + before_bin + tl.load(fine_ptr + bin, mask=bin < FINE, other=0)
        following = _next_filled(fine_ptr, bin, FINE)
        least_above = _LAST - tl.load(counts_ptr + _LEAST_ABOVE).to(tl.int32)
        low = start + bin
        high = tl.where(rank + 1 < until, low, tl.where(following < FINE, start + following, least_above))
        below = tl.load(counts_ptr + _BELOW)
        greatest_below = tl.load(counts_ptr + _GREATEST_BELOW).to(tl.int32)
        among = rank < below
        low = tl.where(among, greatest_below, low)
        high = tl.where(among, tl.where(rank + 1 < below, greatest_below, least_above), high)
        high = tl.where(rank + 1 < elements, high, low)
        above = start == _LAST
        low = tl.where(above, most, low.to(tl.float32, bitcast=True))
        high = tl.where(above, most, high.to(tl.float32, bitcast=True))
        quantile = tl.where(low == high, low, low + fraction * (high - low))
    limit = tl.where(quantile < 1, 1.0, quantile)
    limit = tl.where(limit > most, most, limit)
    nan = tl.load(counts_ptr + _GREATEST) > _INFINITY
    tl.store(limit_ptr + b, tl.where(nan, float("nan"), limit))


# ---- launches -------------------------------------------------------------------------------------------------------


def _shares(walk: Walk, block: int) -> int:
    """Programs for each sample."""
    wanted = -(-_PROGRAMS_PER_MULTIPROCESSOR * launch.multiprocessors(walk.like) // walk.batch)
    return min(tiles_of(walk, block), wanted)


def rescale_factors(walk: Walk, inputs: list[_Optional], step: Step) -> torch.Tensor:
    """What the guided output of each sample is multiplied by: float32 (B,)."""
    chosen = configuration("ddim_step_moments", walk.like.dtype, "reads", 2)
    block = chosen["BLOCK"]
    shares = _shares(walk, block)
    moments = torch.empty(walk.batch * shares * 5, dtype=torch.float64, device=walk.like.device)
    ddim_step_moments_kernel[(walk.batch * shares,)](
        *shared_arguments(walk, inputs, step),
        moments,
        shares,
        RUN_COVERS_TILE=walk.run is not None and walk.run >= block,
        **chosen,
    )
    factors = torch.empty(walk.batch, dtype=torch.float32, device=walk.like.device)
    ddim_step_factor_kernel[(walk.batch,)](
        moments, factors, shares, step.guidance_rescale, BLOCK=triton.next_power_of_2(shares), num_warps=4
    )
    return factors


def dynamic_limits(walk: Walk, inputs: list[_Optional], step: Step, factors: _Optional) -> torch.Tensor:
    """What x0 of each sample is clamped to and divided by: float32 (B,)."""
    chosen = configuration("ddim_step_histogram", walk.like.dtype, step.prediction_type, 1)
    block = chosen["BLOCK"]
    shares = _shares(walk, block)
    position = step.threshold_ratio * (walk.elements - 1)
    rank = math.floor(position)
    (most,) = struct.unpack("i", struct.pack("f", step.threshold_max))
    width = max((most - _ONE.value).bit_length(), 8) if most > _ONE.value else 8
    bins = {"COARSE": 1 << (width - width // 2), "FINE_BITS": width // 2}
    slots = _HEAD.value + bins["COARSE"] + (1 << bins["FINE_BITS"])
    dtype = torch.int32 if walk.elements < 2**31 else torch.int64
    counts = torch.zeros(walk.batch * slots, dtype=dtype, device=walk.like.device)
    refined = step.threshold_max > 1
    for second in (False, True)[: 1 + refined]:
        ddim_step_histogram_kernel[(walk.batch * shares,)](
            *shared_arguments(walk, inputs, step),
            factors, counts, shares, rank, most,
            PREDICTION=PREDICTIONS[step.prediction_type],
            RUN_COVERS_TILE=walk.run is not None and walk.run >= block,
            SECOND=second,
            **bins,
            **chosen,
        )  # fmt: skip
    limits = torch.empty(walk.batch, dtype=torch.float32, device=walk.like.device)
    ddim_step_limit_kernel[(walk.batch,)](
        counts, limits, rank, walk.elements, position - rank, step.threshold_max, REFINED=refined, **bins, num_warps=4
    )
    return limits
