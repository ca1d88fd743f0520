"""A case against float64, piece by piece, so that every element of a large tensor is checked in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_case import GpuCase, Tensors
from benchmarks.timing import first
from fastvdiff import accuracy

PIECE = 1 << 25  # elements of the largest tensor in one piece: 268 MB in float64


class Wrong(AssertionError):  # noqa: N818 - what it says reads as a sentence
    """A result that is further from float64 than the contract allows."""


@dataclass
class _Distance:
    """Squared norms summed over pieces: of the exact values, and of two results' differences from them."""

    exact: float = 0.0
    found: float = 0.0
    eager: float = 0.0

    def add(self, exact: torch.Tensor, found: torch.Tensor, eager: torch.Tensor | None) -> None:
        self.exact += _squared(exact)
        self.found += _squared(found.double() - exact)
        self.eager += _squared(eager.double() - exact) if eager is not None else 0.0

    def errors(self, least: float) -> tuple[float, float]:
        """Relative errors of the result and of eager; `least` is the smallest scale to measure against."""
        scale = max(math.sqrt(self.exact), least) or 1.0
        return math.sqrt(self.found) / scale, math.sqrt(self.eager) / scale


def check(case: GpuCase, tensors: Tensors, impl: str) -> str:
    """Hold `case.fast(impl=impl)` to fastvdiff/accuracy.py; returns what was compared and how close it came.

    The implementation runs once on the whole tensors. Float64 and the eager expression, whose loss sets the limit, run
    on pieces of them; without an eager result the limit is the dtype's floor alone.

    Raises:
        Wrong: an output or a gradient is not close enough.
    """
    found, cotangent = _whole(case, tensors, impl)
    pieces = list(_pieces(case, tensors))
    distances = [_Distance() for _ in found]
    sums: dict[int, list[Any]] = {}  # gradients that pieces share: exact, eager
    for piece in pieces:
        parts = [_cut(t, axis, piece) for t, axis in zip(tensors, _axes(case, tensors), strict=True)]
        weight = None if cotangent is None else _cut(cotangent, case.out_axis, piece)
        exact = _values(case, case.oracle or case.eager, [_wide(t) for t in parts], weight)
        eager = _eager_values(case, parts, weight) or [None] * len(exact)
        for index, (best, plain) in enumerate(zip(exact, eager, strict=True)):
            axis = case.out_axis if index == 0 else _axes(case, tensors)[index - 1]
            if axis is None and len(pieces) > 1:
                total = sums.setdefault(index, [0.0, 0.0])
                total[0], total[1] = total[0] + best, None if plain is None else total[1] + plain.double()
            else:
                distances[index].add(best, _cut(found[index], axis, piece), plain)
    for index, (best, plain) in sums.items():
        distances[index].add(best, found[index], plain)
    return _judge(case, distances, tensors[0].dtype, len(pieces))


def _judge(case: GpuCase, distances: Sequence[_Distance], dtype: torch.dtype, pieces: int) -> str:
    """The sentence about a result that is right; Wrong about one that is not."""
    largest = max((math.sqrt(d.exact) for d in distances[1:]), default=0.0)
    words = []
    for index, distance in enumerate(distances):
        what = f"gradient {index - 1}" if index else "output"
        error, plain = distance.errors(accuracy.GRADIENT_SCALE * largest if index else 0.0)
        ratio = accuracy.GRADIENT_RATIO if index else accuracy.FORWARD_RATIO
        allowed = accuracy.limit(plain, dtype, ratio, tf32=case.tf32)
        if not error <= allowed:  # a NaN fails too
            raise Wrong(f"{what}: relative error {error:.2e} > {allowed:.2e}")
        words.append(f"{what} {error:.1e} of {allowed:.1e}")
    return f"all elements, {pieces} piece{'s' if pieces > 1 else ''}: " + ", ".join(words)


def _whole(case: GpuCase, tensors: Tensors, impl: str) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Output and gradients of the implementation on the whole tensors, and the cotangent they were taken under."""
    if not case.training:
        with torch.no_grad():
            return [first(case.fast(*tensors, impl=impl))], None
    inputs = case.leaves(tensors)
    y = first(case.fast(*inputs, impl=impl))
    generator = torch.Generator(y.device).manual_seed(1)
    cotangent = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], cotangent)], cotangent


def _eager_values(
    case: GpuCase, parts: Sequence[torch.Tensor], cotangent: torch.Tensor | None
) -> list[torch.Tensor] | None:
    """What eager makes of one piece; None where it refuses, or draws noise that nobody else has."""
    if case.draws:
        return None
    try:
        return _values(case, case.eager, parts, cotangent)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def _values(
    case: GpuCase, run: Callable[..., Any], parts: Sequence[torch.Tensor], cotangent: torch.Tensor | None
) -> list[Any]:
    """Output and gradients of one piece."""
    if cotangent is None:
        with torch.no_grad():
            return [first(run(*parts))]
    inputs = case.leaves(parts)
    y = first(run(*inputs))
    return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], cotangent.to(y.dtype))]


def _axes(case: GpuCase, tensors: Sequence[torch.Tensor]) -> tuple[int | None, ...]:
    return case.axes or (None,) * len(tensors)


def _pieces(case: GpuCase, tensors: Tensors) -> Iterator[slice | None]:
    """Slices of units of `grain` along the cut dimension, of the first tensor's extent; None: the whole."""
    if case.out_axis is None:
        yield None
        return
    extent, grain = tensors[0].shape[case.axes[0]], case.grain
    count = min(math.ceil(max(t.numel() for t in tensors) / PIECE), extent // grain)
    step = math.ceil(extent / grain / count) * grain
    for start in range(0, extent, step):
        yield slice(start, min(start + step, extent))


def _cut(t: torch.Tensor, axis: int | None, piece: slice | None) -> torch.Tensor:
    return t if axis is None or piece is None else t.narrow(axis, piece.start, piece.stop - piece.start)


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() else t


def _squared(t: torch.Tensor) -> float:
    return float(t.double().square().sum())
