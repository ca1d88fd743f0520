"""Dense tensors walked in memory order, and where each element stands in logical (row-major) order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl


def memory_order(like: torch.Tensor) -> list[int]:
    """The dimensions of more than one element of a dense tensor, from the outermost in memory inward."""
    sizes, strides = like.shape, like.stride()
    return sorted((d for d in range(like.dim()) if sizes[d] != 1), key=lambda d: -strides[d])


def logical_runs(shape: Sequence[int], order: Sequence[int]) -> list[tuple[int, int]]:
    """(size, logical stride) of the dimensions in `order`, neighbours that are one in both orders merged."""
    runs: list[tuple[int, int]] = []
    for d in order:
        size, stride = shape[d], math.prod(shape[d + 1 :])
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    return runs or [(1, 1)]


def same_layout(t: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether the two, of one shape, have their elements at the same offsets."""
    strides, expected = t.stride(), like.stride()
    if strides == expected:
        return True
    return all(n == 1 or a == b for n, a, b in zip(like.shape, strides, expected, strict=True))


def laid_out(t: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """t with its elements where like's are: itself where they are there, else a copy."""
    return t if t is None or same_layout(t, like) else torch.empty_like(like, dtype=t.dtype).copy_(t)


def buffer(t: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """Where a kernel that walks like's layout writes t: t itself, or a buffer for `written_back`."""
    return t if t is None or same_layout(t, like) else torch.empty_like(like, dtype=t.dtype)


def written_back(t: torch.Tensor, written: torch.Tensor | None) -> torch.Tensor:
    """t, with what a kernel wrote to `written`, its `buffer`."""
    return t if written is None or written is t else t.copy_(written)


@triton.jit
def logical_index(position, sizes, strides, RANK: tl.constexpr):
    """Of elements at a position in memory order, int64: over RANK <= 3 runs, `sizes` of the inner and all `strides`."""
    if RANK == 1:
        return position.to(tl.int64)
    else:
        outer = position // sizes[RANK - 2]
        index = (position - outer * sizes[RANK - 2]).to(tl.int64) * strides[RANK - 1]
        if RANK == 2:
            return index + outer.to(tl.int64) * strides[0]
        else:
            outermost = outer // sizes[0]
            return (
                index + (outer - outermost * sizes[0]).to(tl.int64) * strides[1] + outermost.to(tl.int64) * strides[0]
            )
