"""What every kernel here shares: where it launches, with which configuration, and how its dots multiply.

A launch configuration is a dict of the kernel's constexprs with `num_warps` and `num_stages`. Each kernel proposes one
for a shape class; what `fastvdiff tune` measured on this device replaces it. Nothing is timed here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

Configuration = dict[str, Any]

INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)


class Launch(NamedTuple):
    """A configured launch that `recorded` saw: the kernel, its shape class, what it used and what it might."""

    kernel: str
    shape_class: str
    used: Configuration
    candidates: tuple[Configuration, ...]


_tuned: dict[tuple[str, str], Configuration] = {}
_records: list[Launch] | None = None


def use_tuned(configurations: dict[tuple[str, str], Configuration]) -> None:
    """Replace what was tuned: (kernel, shape class) -> configuration. An empty dict leaves the kernels' own."""
    _tuned.clear()
    _tuned.update(configurations)


@contextlib.contextmanager
def trying(kernel: str, shape_class: str, configuration: Configuration) -> Iterator[None]:
    """Within the block, launches of this kernel for this shape class use `configuration`."""
    key = (kernel, shape_class)
    before = _tuned.get(key)
    _tuned[key] = configuration
    try:
        yield
    finally:
        if before is None:
            del _tuned[key]
        else:
            _tuned[key] = before


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block, every configured launch is noted in the list."""
    global _records
    before, _records = _records, []
    try:
        yield _records
    finally:
        _records = before


def configuration(
    kernel: str, shape_class: str, shipped: Configuration, candidates: Callable[[], Sequence[Configuration]]
) -> Configuration:
    """The launch configuration of `kernel` for a shape class: what was tuned for it here, else `shipped`.

    `candidates()` are the configurations that tuning may try; each has the keys of `shipped`.
    """
    used = _tuned.get((kernel, shape_class), shipped)
    if _records is not None:
        _records.append(Launch(kernel, shape_class, used, tuple(candidates())))
    return used


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A block whose launches go to x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def multiprocessors(x: torch.Tensor) -> int:
    """Multiprocessors of x's device; under the interpreter few, so that a split over the device is still one."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def architecture() -> int:
    """The CUDA device's compute capability as a number (90 for sm_90); 0 where there is none."""
    if INTERPRETED:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def dot_precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s input_precision: tf32 only for float32 and only where torch's own matmul setting allows it."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b summed in float32; 2-D, or 3-D batched.

    Triton's interpreter multiplies the raw bits of bfloat16: there both are widened first, which changes no product.
    """
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 x rounded to the nearest DTYPE, ties to even.

    Triton's interpreter cuts the low bits off for bfloat16: there the rounding is added to them first.
    """
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)
