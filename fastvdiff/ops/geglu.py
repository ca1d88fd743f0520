"""The gated activation of a transformer's feed-forward layer in one pass over memory."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from fastvdiff import checks, dispatch
from fastvdiff.reference.geglu import geglu as _reference

from . import registration

_OP = "geglu"


def geglu(x: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """`h * gelu(gate)` with (h, gate) the halves of x, as diffusers' GEGLU has it after its projection.

    Equivalent to::

        h, gate = x.chunk(2, dim=-1)
        y = h * F.gelu(gate)

    computed in float32 (float64 for float64 inputs) and rounded once. The backward keeps x alone. Under autocast the
    result has autocast's dtype.

    Args:
        x: (..., 2 D), float32, bfloat16, float16 or float64, any strides; a copy is made where a row's elements are
            not neighbours.
        impl: None, or the implementation to use, strictly: "cpu", "triton" or "reference".

    Returns:
        (..., D) of x's dtype, contiguous.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        NotImplementedError: `impl` does not support the call.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202, equation 6; gelu by the normal distribution
    function itself: Hendrycks & Gimpel, arXiv:1606.08415, equation 1.
    """
    checks.tensor(_OP, "x", x)
    checks.floating(_OP, "x", x)
    if not x.dim() or x.shape[-1] % 2:
        checks.fail(_OP, "x", "(..., 2 D): an even number of elements in the last dimension", f"shape {tuple(x.shape)}")
    x = x.to(registration.autocast_dtype(x))
    chosen = dispatch.choose(_OP, dispatch.facts_of(x, dispatch.needs_grad(x)), impl)
    with registration.without_autocast(x):
        return chosen.call(x)


def _left_to_the_compiler(facts: dispatch.Facts) -> str | None:
    """torch.compile writes the same pass by itself, and may join it with others."""
    return "left to torch.compile" if torch.compiler.is_compiling() else None


def _on_triton(facts: dispatch.Facts) -> str | None:
    return registration.interpreted(facts) or _left_to_the_compiler(facts)


def _call_kernel(impl: str, x: torch.Tensor) -> torch.Tensor:
    return registration.call(_forward_op, dispatch.needs_grad(x), x, impl)


def _forward(x: torch.Tensor, impl: str) -> torch.Tensor:
    return registration.backend(impl, _OP).forward(_rows(x)).reshape(_result_shape(x))


def _fake_forward(x: torch.Tensor, impl: str) -> torch.Tensor:
    return x.new_empty(_result_shape(x))


def _backward(grad: torch.Tensor, x: torch.Tensor, impl: str) -> torch.Tensor:
    return registration.backend(impl, _OP).backward(_rows(grad), _rows(x)).reshape(x.shape)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as (rows, D), the elements of a row neighbours: a view where it can be."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _result_shape(x: torch.Tensor) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // 2)


def _fake_backward(grad: torch.Tensor, x: torch.Tensor, impl: str) -> torch.Tensor:
    return x.new_empty(x.shape)


_forward_op = registration.define("geglu(Tensor x, str impl) -> Tensor", kernel=_forward, fake=_fake_forward)
_backward_op = registration.define(
    "geglu_backward(Tensor grad, Tensor x, str impl) -> Tensor", kernel=_backward, fake=_fake_backward
)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, str], output: torch.Tensor) -> None:
    x, ctx.impl = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return registration.call(_backward_op, torch.is_grad_enabled(), grad, *ctx.saved_tensors, ctx.impl), None


registration.differentiable(
    _forward_op, setup_context=_setup_context, backward=_differentiate, backward_op=_backward_op
)
dispatch.register(
    _OP,
    dispatch.Impl(
        "cpu", registration.on_cpu, partial(_call_kernel, "cpu"), verified=frozenset({"x86_64"}),
        slower=_left_to_the_compiler,
    ),
    dispatch.Impl(
        "triton", registration.on_triton, partial(_call_kernel, "triton"), frozenset(), slower=_on_triton
    ),
    dispatch.Impl("reference", lambda facts: None, _reference),
)  # fmt: skip
