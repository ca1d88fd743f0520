"""ddim_step's statistics of a whole sample: the rescale of guidance and the dynamic threshold.

**Computes**
  factor = r std(c) / std(u + w (c - u)) + 1 - r;  limit = the ratio quantile of |x0|, between 1 and the maximum.

**Work split**
  A few programs for each multiprocessor, a share of one sample's tiles each; one program for each sample joins what
  they found. Rescale: means and centred squares, merged by Chan's formula in a fixed order. Threshold: bits of
  non-negative floats sort as the floats do, and what lies below 1 or above the maximum need not be told apart, so two
  histograms of the bits between find the quantile exactly: the first over all of them, the second inside one bin of
  the first. In a large sample every 61st tile is looked at before, for a bracket of bins around the quantile: the first
  histogram then takes what lies inside, and counts the rest as two lumps at its ends. Where the quantile turns out to
  lie outside (tiles unlike the others), the device takes the lumps apart in a further pass. Counts are integers: the
  order of their additions does not show.

**Traffic**
  Rescale: c and u once. Threshold: x, c and u twice; once where the maximum is 1 or where the first histogram shows
  that the quantile lies below 1 or above the maximum. An atomic addition in L2 for each element between those, or
  inside the bracket, a per cent of them: on an H100 one for each took four times the time of the bytes.

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
# Slots of a sample's counts before its bins: values below 1, bits of the greatest of them, of the greatest of all,
# _LAST - bits of the least above the second histogram, so that zero is where every maximum starts; values looked at,
# and those before and after the bracket.
_BELOW, _GREATEST_BELOW, _GREATEST, _LEAST_ABOVE, _SEEN, _BEFORE, _AFTER, _HEAD = (
    tl.constexpr(i) for i in (0, 1, 2, 3, 4, 5, 6, 16)
)
# A sample's bracket: its first and last bin, and whether the quantile was found outside.
_LOW, _HIGH, _MISSED, _BRACKET = (tl.constexpr(i) for i in (0, 1, 2, 4))
_LOOK, _FIRST, _REST, _SECOND = (tl.constexpr(i) for i in range(4))  # passes
_EVERY = 61  # of the tiles one is looked at: no divisor of a frame's
_LARGE = 1 << 20  # elements of a sample from which that pays
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


@triton.jit(do_not_specialize=["rank", "most", "every"])
def ddim_step_histogram_kernel(
    sample_ptr, output_ptr, uncond_ptr, alpha_t_ptr, alpha_prev_ptr, guidance_ptr,
    alpha_t: tl.float64, alpha_prev: tl.float64, guidance: tl.float32,
    stride_at, stride_ap, stride_gb, stride_gt, run, frames, elements,
    factor_ptr, counts_ptr, bracket_ptr, shares, rank, most, every,
    PREDICTION: tl.constexpr, RUN_COVERS_TILE: tl.constexpr, PASS: tl.constexpr, COARSE: tl.constexpr,
    FINE_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds a share's tiles to a histogram of bits.

    _FIRST: what lies in the bracket, or everything where there is none, and the statistics beside the bins. _REST: what
    lies outside, where the bracket missed. _SECOND: what lies inside the bin of `rank` in the first, to the second.
    _LOOK: every `every`-th tile of everything, to counts of its own.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(tl.cast(elements, tl.int64), BLOCK).to(tl.int32)
    b = (pid // shares).to(tl.int64)
    index = tl.arange(0, BLOCK)
    counts_ptr += b * (_HEAD + COARSE + (1 << FINE_BITS))
    start = tl.full((), _ONE, tl.int32)
    end = start
    last_tile = tiles
    low = start * 0
    high = low + (COARSE - 1)
    if bracket_ptr is not None:
        low = tl.load(bracket_ptr + b * _BRACKET + _LOW)
        high = tl.load(bracket_ptr + b * _BRACKET + _HIGH)
    if PASS == _REST:
        last_tile = tl.where(tl.load(bracket_ptr + b * _BRACKET + _MISSED) != 0, tiles, 0)
    if PASS == _SECOND:
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
    before = below
    after = below
    seen = below
    tile = pid % shares * every
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
        if PASS == _SECOND:
            greatest = tl.maximum(greatest, tl.where(mask & (bits >= end), _LAST - bits, 0))
            inside = mask & (bits >= start) & (bits < end)
            tl.atomic_add(counts_ptr + (_HEAD + COARSE) + (bits - start), 1, mask=inside, sem="relaxed")
        else:
            inside = mask & (bits >= _ONE) & (bits <= most)
            bin = (bits - _ONE) >> FINE_BITS
            if PASS != _REST:
                small = mask & (bits < _ONE)
                below += small.to(tl.int32)
                greatest_below = tl.maximum(greatest_below, tl.where(small, bits, 0))
                greatest = tl.maximum(greatest, tl.where(mask, bits, 0))
            if PASS == _LOOK:
                seen += mask.to(tl.int32)
            elif bracket_ptr is not None:
                early, late = inside & (bin < low), inside & (bin > high)
                if PASS == _REST:
                    inside = early | late
                else:
                    before += early.to(tl.int32)
                    after += late.to(tl.int32)
                    inside = inside & (bin >= low) & (bin <= high)
            tl.atomic_add(counts_ptr + _HEAD + bin, 1, mask=inside, sem="relaxed")
        tile += shares * every
    if PASS == _SECOND:
        tl.atomic_max(counts_ptr + _LEAST_ABOVE, tl.max(greatest, axis=0), sem="relaxed")
    elif PASS != _REST:
        tl.atomic_add(counts_ptr + _BELOW, tl.sum(below, axis=0), sem="relaxed")
        tl.atomic_max(counts_ptr + _GREATEST_BELOW, tl.max(greatest_below, axis=0), sem="relaxed")
        tl.atomic_max(counts_ptr + _GREATEST, tl.max(greatest, axis=0), sem="relaxed")
        if PASS == _LOOK:
            tl.atomic_add(counts_ptr + _SEEN, tl.sum(seen, axis=0), sem="relaxed")
        elif bracket_ptr is not None:
            tl.atomic_add(counts_ptr + _BEFORE, tl.sum(before, axis=0), sem="relaxed")
            tl.atomic_add(counts_ptr + _AFTER, tl.sum(after, axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["rank"])
def ddim_step_bracket_kernel(looked_ptr, bracket_ptr, rank, elements, COARSE: tl.constexpr, FINE_BITS: tl.constexpr):
    """The bins between which the value of this rank should lie, from what was looked at.

    Sixteen standard deviations of independent values to either side, and 64 values: neighbours are alike.
    """
    b = tl.program_id(0).to(tl.int64)
    looked_ptr += b * (_HEAD + COARSE + (1 << FINE_BITS))
    below, seen = tl.load(looked_ptr + _BELOW), tl.load(looked_ptr + _SEEN).to(tl.float64)
    there = (tl.cast(rank, tl.float64) + 0.5) / tl.cast(elements, tl.float64)
    margin = 64.0 + 16.0 * tl.sqrt(seen * there * (1.0 - there))
    low, _ = _find(looked_ptr + _HEAD, (seen * there - margin).to(below.dtype) - below, COARSE)
    high, _ = _find(looked_ptr + _HEAD, (seen * there + margin).to(below.dtype) - below, COARSE)
    tl.store(bracket_ptr + b * _BRACKET + _LOW, tl.minimum(low, COARSE - 1))
    tl.store(bracket_ptr + b * _BRACKET + _HIGH, tl.minimum(high, COARSE - 1))


@triton.jit(do_not_specialize=["rank"])
def ddim_step_lumps_kernel(counts_ptr, bracket_ptr, rank, elements, COARSE: tl.constexpr, FINE_BITS: tl.constexpr):
    """Puts the values outside the bracket into the bins beside it; where the rank is among them, notes that instead."""
    b = tl.program_id(0).to(tl.int64)
    counts_ptr += b * (_HEAD + COARSE + (1 << FINE_BITS))
    bracket_ptr += b * _BRACKET
    rank = tl.cast(rank, counts_ptr.dtype.element_ty)
    low, high = tl.load(bracket_ptr + _LOW), tl.load(bracket_ptr + _HIGH)
    below, before, after = tl.load(counts_ptr + _BELOW), tl.load(counts_ptr + _BEFORE), tl.load(counts_ptr + _AFTER)
    _, inside = _find(counts_ptr + _HEAD, tl.cast(elements, counts_ptr.dtype.element_ty), COARSE)
    place = rank - below
    missed = (place >= 0) & ((place < before) | ((place >= before + inside) & (place < before + inside + after)))
    tl.store(bracket_ptr + _MISSED, missed.to(tl.int32))
    # Of an empty lump there is no bin beside the bracket.
    tl.store(counts_ptr + _HEAD + low - 1, before, mask=(before > 0) & (missed == 0))
    tl.store(counts_ptr + _HEAD + high + 1, after, mask=(after > 0) & (missed == 0))


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
    refined = step.threshold_max > 1

    def zeros() -> torch.Tensor:
        return torch.zeros(walk.batch * slots, dtype=dtype, device=walk.like.device)

    def read(which: tl.constexpr, counts: torch.Tensor, bracket: _Optional, shares: int, every: int = 1) -> None:
        ddim_step_histogram_kernel[(walk.batch * shares,)](
            *shared_arguments(walk, inputs, step),
            factors, counts, bracket, shares, rank, most, every,
            PREDICTION=PREDICTIONS[step.prediction_type],
            RUN_COVERS_TILE=walk.run is not None and walk.run >= block,
            PASS=which.value,
            **bins,
            **chosen,
        )  # fmt: skip

    counts, bracket = zeros(), None
    if refined and walk.elements >= _LARGE:
        looked = zeros()
        bracket = torch.zeros(walk.batch * _BRACKET.value, dtype=torch.int32, device=walk.like.device)
        read(_LOOK, looked, None, min(shares, -(-tiles_of(walk, block) // _EVERY)), _EVERY)
        ddim_step_bracket_kernel[(walk.batch,)](looked, bracket, rank, walk.elements, **bins, num_warps=8)
    read(_FIRST, counts, bracket, shares)
    if bracket is not None:
        ddim_step_lumps_kernel[(walk.batch,)](counts, bracket, rank, walk.elements, **bins, num_warps=8)
        read(_REST, counts, bracket, shares)
    if refined:
        read(_SECOND, counts, None, shares)
    limits = torch.empty(walk.batch, dtype=torch.float32, device=walk.like.device)
    ddim_step_limit_kernel[(walk.batch,)](
        counts, limits, rank, walk.elements, position - rank, step.threshold_max, REFINED=refined, **bins, num_warps=4
    )
    return limits
