"""Means and centred sums of squares: pooled over tiles, from channels to groups, and back to channels.

A "column" is a block of channels that one program reads; it meets a few groups, its "slots". Slot k of the column that
starts at channel c0 is group c0 // WIDTH + k, WIDTH being the channels of a group; groups need not end where columns
do. Everything is float32 and every sum of centred squares is centred on the mean it comes with (Chan, Golub & LeVeque
1983), so that nothing cancels at any mean.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

_SLOT_TILE = 1024  # elements of a tile of partial moments: with 2048 this phase takes the most registers, not the loops


@functools.lru_cache(maxsize=4096)
def slots_of(column: int, width: int, groups: int) -> int:
    """The most groups that a column of `column` channels meets, as a power of two."""
    if column % width == 0:
        met = column // width
    elif width % column == 0:
        met = 1
    else:
        met = (column - 2) // width + 2
    return triton.next_power_of_2(min(met, groups))


def shares_of(column: int, width: int) -> int:
    """The most columns of `column` channels that meet one group."""
    if column % width == 0:
        return 1
    return width // column if width % column == 0 else (width - 2) // column + 2


@functools.lru_cache(maxsize=4096)
def items_of(slots: int, items: int) -> int:
    """Partial moments of each of `slots` groups that are pooled at a time."""
    return max(1, min(_SLOT_TILE // slots, triton.next_power_of_2(items)))


@triton.jit
def pool(mean, m2, n, AXIS: tl.constexpr):
    """Moments of the parts of a tile along AXIS, n values each (n = 0: whatever stands there counts for nothing)."""
    total = tl.sum(n, AXIS)
    share = n / tl.expand_dims(tl.maximum(total, 1.0), AXIS)
    present = n > 0
    mean = tl.where(present, mean, 0.0)
    # The mean twice, the second time of what the first left: the sum of large means alone would round.
    rough = tl.sum(share * mean, AXIS)
    rough_there = tl.expand_dims(rough, AXIS)
    left = tl.where(present, mean, rough_there) - rough_there  # a masked difference, Triton 3.6 fails to lay out
    pooled = rough + tl.sum(share * left, AXIS)
    apart = tl.where(present, mean - tl.expand_dims(pooled, AXIS), 0.0)
    return pooled, tl.sum(tl.where(present, m2, 0.0) + n * apart * apart, AXIS), total


@triton.jit
def pool_rows(mean, m2, n):
    """`pool` over axis 0 with n (rows,) values in each element of a row; where n is 0, mean and m2 are 0 too.

    The total is a scalar and n depends on nothing but the row: the tile stays in the layout that it was loaded in.
    """
    total = tl.sum(n, 0)
    share = (n / total)[:, None]
    rough = tl.sum(share * mean, 0)
    pooled = rough + tl.sum(share * (mean - rough[None, :]), 0)
    apart = mean - pooled[None, :]
    return pooled, tl.sum(m2 + n[:, None] * apart * apart, 0), total


@triton.jit
def membership(c0, lane, WIDTH, SLOTS: tl.constexpr):
    """(len(lane), SLOTS): whether channel c0 + lane is of the slot's group; without a division for every channel."""
    low = (c0 // WIDTH + tl.arange(0, SLOTS)) * WIDTH - c0
    return (lane[:, None] >= low[None, :]) & (lane[:, None] < (low + WIDTH)[None, :])


@triton.jit
def to_slots(mean, m2, n, member):
    """Moments of the slots from those of channels with n values each."""
    count = tl.where(member, n[:, None], 0.0)
    return pool(tl.broadcast_to(mean[:, None], count.shape), tl.broadcast_to(m2[:, None], count.shape), count, 0)


@triton.jit
def to_channels(value, member):
    """A slot's value at each of its channels."""
    return tl.sum(tl.where(member, value[None, :], 0.0), 1)


@triton.jit
def store_partials(
    partials_ptr, plane, mean, m2, n, sample, column, part, parts, C, WIDTH, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    """Write the moments that one program found of its column's slots, where `pool_partials` finds them.

    Three planes of `plane` values, mean, centred squares and count, each (sample, group, share, part): a group is
    shared by the columns that meet it, SHARES at most.
    """
    group = column * BLOCK_C // WIDTH + tl.arange(0, SLOTS)
    share = column - group * WIDTH // BLOCK_C
    groups = C // WIDTH
    at = sample * groups * SHARES * parts + (group * SHARES + share) * parts + part
    met = (group < groups) & (group * WIDTH < (column + 1) * BLOCK_C)
    tl.store(partials_ptr + at, mean, mask=met)
    tl.store(partials_ptr + plane + at, m2, mask=met)
    tl.store(partials_ptr + 2 * plane + at, n, mask=met)


@triton.jit
def pool_partials(
    partials_ptr, plane, sample, c0, C, WIDTH, parts, COLUMN: tl.constexpr, SHARES: tl.constexpr, SLOTS: tl.constexpr,
    ITEMS: tl.constexpr,
):  # fmt: skip
    """Moments of the SLOTS groups from c0's on, over all of the sample, stored from columns of COLUMN channels."""
    group = c0 // WIDTH + tl.arange(0, SLOTS)
    groups = C // WIDTH
    last = ((group + 1) * WIDTH - 1) // COLUMN
    items = tl.where(group < groups, (last - group * WIDTH // COLUMN + 1) * parts, 0)
    first = partials_ptr + sample * groups * SHARES * parts + (group * SHARES * parts)[:, None]
    mean = tl.zeros([SLOTS], tl.float32)
    m2 = tl.zeros([SLOTS], tl.float32)
    n = tl.zeros([SLOTS], tl.float32)
    for start in tl.range(0, SHARES * parts, ITEMS):
        item = start + tl.arange(0, ITEMS)[None, :]
        found = item < items[:, None]
        part_mean = tl.load(first + item, mask=found, other=0.0)
        part_m2 = tl.load(first + plane + item, mask=found, other=0.0)
        part_n = tl.load(first + 2 * plane + item, mask=found, other=0.0)
        more_mean, more_m2, more_n = pool(part_mean, part_m2, part_n, 1)
        n += more_n
        share = more_n / tl.maximum(n, 1.0)
        apart = more_mean - mean
        mean += apart * share
        m2 += more_m2 + apart * apart * share * (n - more_n)
    return mean, m2, n
