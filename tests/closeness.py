"""The tests' only tolerances: an implementation is held to the reference in float64, next to what eager loses.

The ratios and floors are fastvdiff/accuracy.py's; the two for single elements stand here.

err = ||y - oracle|| / scale. The oracle is the reference on inputs upcast from the tested dtype to float64; the
baseline is the eager expression in the tested dtype. No environment variable changes anything here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fastvdiff.accuracy import FLOORS, FORWARD_RATIO, GRADIENT_RATIO, GRADIENT_SCALE, limit, relative_error

MAX_RATIO = 2.0
MAX_ULPS = 2.0


def assert_close(
    y: torch.Tensor,
    oracle: torch.Tensor,
    baseline: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    ratio: float = FORWARD_RATIO,
    least_scale: float = 0.0,
    what: str = "output",
) -> None:
    """y is as close to the float64 `oracle` as `baseline` is, within `ratio` and the dtype's floor.

    `dtype` is the dtype of the computation where the result's own is wider (a float32 parameter's gradient in a
    bfloat16 call).
    """
    dtype, oracle = dtype or y.dtype, oracle.detach()
    assert y.shape == oracle.shape, f"{what}: shape {tuple(y.shape)}, expected {tuple(oracle.shape)}"
    assert torch.isfinite(oracle).all(), f"{what}: the oracle itself is not finite; draw other inputs"
    assert torch.isfinite(y).all(), f"{what}: not finite"
    if oracle.numel() == 0:
        return
    if max(float(oracle.norm()), least_scale) == 0.0:
        assert float(y.detach().norm()) == 0.0, f"{what}: expected zeros"
        return
    error, plain = (relative_error(t, oracle, least_scale) for t in (y, baseline))
    allowed = limit(plain, dtype, ratio)
    assert error <= allowed, f"{what}: relative error {error:.3e} > {allowed:.3e} (baseline's {plain:.3e}, {dtype})"
    largest, plain_largest = (float((t.detach().double() - oracle).abs().max()) for t in (y, baseline))
    # Of the largest value, or of the scale spread over the elements where that is what was measured. In float32 the
    # norm's floor counts here too: a sum of one element may carry all of the error that the norm allows.
    magnitude = max(float(oracle.abs().max()), least_scale / math.sqrt(oracle.numel()))
    bound = MAX_RATIO * plain_largest + max(MAX_ULPS * torch.finfo(dtype).eps, FLOORS[dtype]) * magnitude
    assert largest <= bound, f"{what}: largest error {largest:.3e} > {bound:.3e} ({dtype})"


def hold(
    op: Callable[..., Any],
    *args: Any,
    impl: str | None = None,
    dtype: torch.dtype,
    baseline: Callable[..., Any] | None = None,
    gradients: bool = True,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    """Hold `op(..., impl=impl)` against the reference in float64, outputs and every gradient; returns its output.

    Floating tensors among the arguments are used as they are for the call, and upcast to float64 for the oracle; those
    with requires_grad get their gradients compared under one random cotangent. `baseline` is the eager expression
    (default: the reference in the tested dtype). `dtype` is the dtype of the computation.
    """
    call = _run(op, args, {**kwargs, "impl": impl}, None, gradients, seed)
    eager = _run(baseline or op, args, kwargs if baseline else {**kwargs, "impl": "reference"}, None, gradients, seed)
    oracle = _run(op, args, {**kwargs, "impl": "reference"}, torch.float64, gradients, seed)
    for index, (y, exact, plain) in enumerate(zip(call[0], oracle[0], eager[0], strict=True)):
        assert_close(y, exact, plain, dtype=dtype, what=f"output {index}")
    largest = max((float(g.norm()) for g in oracle[1].values()), default=0.0)
    for name, exact in oracle[1].items():
        assert_close(
            call[1][name], exact, eager[1][name], dtype=dtype, ratio=GRADIENT_RATIO,
            least_scale=GRADIENT_SCALE * largest, what=f"gradient of {name}",
        )  # fmt: skip
        assert call[1][name].dtype == _leaf(args, kwargs, name).dtype, f"gradient of {name}: dtype"
    return call[2]


def _leaf(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> torch.Tensor:
    key, _, inner = name.partition(".")
    value = args[int(key)] if key.isdigit() else kwargs[key]
    return value[int(inner)] if inner else value


def _run(
    op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], wide: torch.dtype | None, gradients: bool,
    seed: int,
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], Any]:  # fmt: skip
    """Outputs, gradients by argument name, and the raw result of one call on fresh leaves of the same strides."""
    leaves: dict[str, torch.Tensor] = {}

    def fresh(name: str, value: Any) -> Any:
        if isinstance(value, tuple) and any(isinstance(v, torch.Tensor) for v in value):
            return tuple(fresh(f"{name}.{i}", v) for i, v in enumerate(value))
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        copy = value.detach().to(wide) if wide is not None else value.detach()
        if value.requires_grad and gradients:
            copy = leaves[name] = copy.requires_grad_(True)
        return copy

    new_args = [fresh(str(i), a) for i, a in enumerate(args)]
    result = op(*new_args, **{name: fresh(name, value) for name, value in kwargs.items()})
    outputs = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
    if not leaves:
        return outputs, {}, result
    differentiable = [t for t in outputs if t.requires_grad]
    cotangents = []
    for i, t in enumerate(differentiable):
        draw = torch.randn(t.shape, generator=torch.Generator().manual_seed(seed + i))
        # Rounded to the narrow dtype once, so that every run sees the same numbers.
        cotangents.append(draw.to(torch.bfloat16).to(t.device, t.dtype))
    grads = torch.autograd.grad(differentiable, list(leaves.values()), cotangents, allow_unused=True)
    found = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, grads, strict=True)}
    return outputs, found, result
