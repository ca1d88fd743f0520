"""GroupNorm, per-sample modulation and SiLU in one pass over memory."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from fastvdiff import checks, dispatch
from fastvdiff.reference.group_norm_silu import group_norm_silu as _reference

from . import registration

_OP = "group_norm_silu"


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
    stats: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """GroupNorm, then `* (1 + scale) + shift`, then SiLU.

    Equivalent to::

        y = F.group_norm(x, num_groups, weight, bias, eps)
        y = y * (1 + scale) + shift      # over the spatial dimensions
        y = F.silu(y)

    computed in float32 (float64 for float64 inputs) and rounded once. Under autocast the result has autocast's dtype
    and the parameters are used as they are.

    Args:
        x: (B, C, *spatial) with one to three spatial dimensions, float32, bfloat16, float16 or float64, any strides.
        num_groups: number of groups G; divides C.
        weight, bias: (C,) each, any floating dtype, or None.
        eps: added to the variance.
        scale, shift: (B, C) each, or (B, C, T) for a 5-D x; either may come alone.
        silu: False leaves the activation out.
        stats: (B, G, 2) float32, mean and centred sum of squares of each group of x, as `conv3d(stats_groups=G)`
            returns them: saves one read of x. Its gradient is part of x's.
        impl: None, or the implementation to use, strictly: "cpu", "triton", "cuda", "cuda_sm90" (channels_last, samples
            that fit in the shared memory of clusters: x is read once) or "reference".

    Returns:
        A tensor of x's shape, memory format and dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        NotImplementedError: `impl` does not support the call.

    Source: Wu & He, "Group Normalization", arXiv:1803.08494, equations 1-4 and 7; modulation as in Dhariwal & Nichol,
    arXiv:2105.05233, section 3.
    """
    _check(x, num_groups, weight, bias, scale, shift, stats)
    x = x.to(registration.autocast_dtype(x))
    facts = dispatch.facts_of(
        x, dispatch.needs_grad(x, weight, bias, scale, shift), num_groups=num_groups, stats=stats is not None
    )
    chosen = dispatch.choose(_OP, facts, impl)
    with registration.without_autocast(x):
        return chosen.call(x, num_groups, weight, bias, eps, scale, shift, silu, stats)


def _check(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    stats: torch.Tensor | None,
) -> None:
    checks.tensor(_OP, "x", x)
    checks.floating(_OP, "x", x)
    if not 3 <= x.dim() <= 5:
        checks.fail(_OP, "x", "(B, C, *spatial) with one to three spatial dimensions", f"shape {tuple(x.shape)}")
    batch, channels, frames = x.shape[:3]
    if not isinstance(num_groups, (int, torch.SymInt)):
        checks.fail(_OP, "num_groups", "an int", checks.describe(num_groups), TypeError)
    if num_groups < 1 or channels % num_groups:
        checks.fail(_OP, "num_groups", f"a divisor of C = {channels}", num_groups)
    if x.numel() and x[0].numel() == num_groups:
        checks.fail(_OP, "x", "more than one value per group", f"shape {tuple(x.shape)} with {num_groups} groups")
    checks.parameter(_OP, "weight", weight, x, "x", (channels,), symbols="(C,)")
    checks.parameter(_OP, "bias", bias, x, "x", (channels,), symbols="(C,)")
    modulation = [(batch, channels)] + ([(batch, channels, frames)] if x.dim() == 5 else [])
    symbols = "(B, C) or (B, C, T)" if x.dim() == 5 else "(B, C)"
    checks.parameter(_OP, "scale", scale, x, "x", *modulation, symbols=symbols)
    checks.parameter(_OP, "shift", shift, x, "x", *modulation, symbols=symbols)
    checks.parameter(_OP, "stats", stats, x, "x", (batch, num_groups, 2), symbols="(B, G, 2)")


def _in_clusters(facts: dispatch.Facts) -> str | None:
    """What the kernel that keeps a sample in shared memory asks for."""
    return registration.on_sm90(facts) or _fits_clusters(facts)


def _fits_clusters(facts: dispatch.Facts) -> str | None:
    batch, channels, *space = facts.shape
    groups = facts.options.get("num_groups")
    if groups is None:
        return "the number of groups is not known"
    if facts.options["stats"]:
        return "with `stats`, x is read once anyway"
    if facts.strides[1] != 1 or channels == 1 or math.prod(space) == 1:
        return "x is not channels_last"
    cut = registration.backend("cuda_sm90", _OP).cut
    if 0 in facts.shape or cut(batch, channels, math.prod(space), groups, facts.dtype.itemsize, 1) is not None:
        return None
    return "no column of whole groups and whole 16-byte accesses fits in the shared memory of a cluster"


def _call_reference(
    x: torch.Tensor, num_groups: int, weight: Any, bias: Any, eps: float, scale: Any, shift: Any, silu: bool, stats: Any
) -> torch.Tensor:
    # The statistics are read from x again: as constants they would cut the gradient through the norm.
    return _reference(x, num_groups, weight, bias, eps, scale, shift, silu)


def _call_kernel(
    impl: str, x: torch.Tensor, num_groups: int, weight: Any, bias: Any, eps: float, scale: Any, shift: Any, silu: bool,
    stats: Any,
) -> torch.Tensor:  # fmt: skip
    recorded = dispatch.needs_grad(x, weight, bias, scale, shift)
    return registration.call(_forward_op, recorded, x, num_groups, weight, bias, eps, scale, shift, silu, stats, impl)[
        0
    ]


def _forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *arguments, impl = arguments
    return registration.backend(impl, _OP).forward(*arguments)


def _fake_forward(x: torch.Tensor, num_groups: int, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty((x.shape[0], num_groups, 2), dtype=torch.float32)


def _backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *arguments, impl = arguments
    return registration.backend(impl, _OP).backward(*arguments)


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, moments: torch.Tensor, num_groups: int, weight: Any, bias: Any,
    scale: Any, shift: Any, silu: bool, impl: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return (
        torch.empty_like(x),
        *(x.new_empty(0) if p is None else torch.empty_like(p, memory_format=torch.contiguous_format)
          for p in (weight, bias, scale, shift)),
    )  # fmt: skip


_forward_op = registration.define(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift,"
    " bool silu, Tensor? stats, str impl) -> (Tensor, Tensor)",
    kernel=_forward,
    fake=_fake_forward,
)
_backward_op = registration.define(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor moments, int num_groups, Tensor? weight, Tensor? bias,"
    " Tensor? scale, Tensor? shift, bool silu, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, ctx.num_groups, weight, bias, _, scale, shift, ctx.silu, _, ctx.impl = inputs
    ctx.set_materialize_grads(False)  # the moments have none
    ctx.save_for_backward(x, weight, bias, scale, shift, output[1])


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, scale, shift, moments = ctx.saved_tensors
    arguments = (grad, x, moments, ctx.num_groups, weight, bias, scale, shift, ctx.silu, ctx.impl)
    dx, dweight, dbias, dscale, dshift = registration.call(_backward_op, torch.is_grad_enabled(), *arguments)
    return (
        dx, None,
        None if weight is None else dweight, None if bias is None else dbias, None,
        None if scale is None else dscale, None if shift is None else dshift, None, None, None,
    )  # fmt: skip


registration.differentiable(
    _forward_op, setup_context=_setup_context, backward=_differentiate, backward_op=_backward_op
)
dispatch.register(
    _OP,
    dispatch.Impl("cpu", registration.on_cpu, partial(_call_kernel, "cpu"), verified=frozenset({"x86_64"})),
    dispatch.Impl(
        "triton", registration.on_triton, partial(_call_kernel, "triton"), frozenset(), slower=registration.interpreted
    ),
    # After triton, which an H100 runs 5 to 40 % faster.
    dispatch.Impl("cuda", registration.on_cuda, partial(_call_kernel, "cuda"), frozenset()),
    # Last: x is read once, and yet an H100 takes up to twice as long as triton; 45x80 positions 72 us beside 36.
    dispatch.Impl("cuda_sm90", _in_clusters, partial(_call_kernel, "cuda_sm90"), frozenset()),
    dispatch.Impl("reference", lambda facts: None, _call_reference),
)
