"""GroupNorm, modulation, SiLU and a 3-D convolution, with the activation recomputed in the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from fastvdiff import checks, dispatch
from fastvdiff.reference.conv3d import conv3d as _reference_conv3d
from fastvdiff.reference.norm_silu_conv3d import norm_silu_conv3d as _reference

from . import registration
from .conv3d import check as check_convolution
from .group_norm_silu import group_norm_silu

_OP = "norm_silu_conv3d"


def norm_silu_conv3d(
    x: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    stats: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str | Sequence[str] = "zeros",
    prefix: torch.Tensor | None = None,
    channel_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    stats_groups: int = 0,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """GroupNorm, `* (1 + scale) + shift`, SiLU, and a 3-D convolution of the result.

    Equivalent to::

        h = F.group_norm(x, num_groups, norm_weight, norm_bias, eps)
        h = h * (1 + scale) + shift
        h = F.silu(h)
        y = conv3d(h, weight, bias, stride, padding, dilation, groups, ...)

    Padding applies to h. With a gradient only x is kept for the backward, which computes h again: half the activation
    memory of the two ops, for one more pass of the norm.

    Args:
        x: (B, C, T, H, W), float32, bfloat16, float16 or float64, any strides.
        num_groups: number of groups G of the norm; divides C.
        norm_weight, norm_bias: (C,) each, any floating dtype, or None.
        weight: (C_out, C / groups, kT, kH, kW), any floating dtype.
        bias: (C_out,), any floating dtype, or None.
        eps: added to the variance.
        stats: (B, G, 2), mean and centred sum of squares of each group of x, as `conv3d(stats_groups=G)` returns them.
        scale, shift: (B, C) or (B, C, T) each; either may come alone.
        silu: False leaves the activation out.
        stride, padding, dilation, groups, padding_mode, prefix, channel_bias, residual, stats_groups: as in `conv3d`;
            prefix holds frames of h, not of x.
        impl: None, or the implementation to use, strictly: "cpu" or "reference".

    Returns:
        As `conv3d`: y, or (y, statistics of y) with `stats_groups`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        NotImplementedError: `impl` does not support the call.

    Source: Wu & He, "Group Normalization", arXiv:1803.08494; the block of Ho et al., arXiv:2006.11239, appendix B.
    """
    check_convolution(_OP, x, weight, bias, stride, padding, dilation, groups, padding_mode, prefix, channel_bias,
                      residual, stats_groups)  # fmt: skip
    _check_norm(x, num_groups, norm_weight, norm_bias, stats, scale, shift)
    x = x.to(registration.autocast_dtype(x))
    differentiable = (x, norm_weight, norm_bias, weight, bias, scale, shift, prefix, channel_bias, residual)
    facts = dispatch.facts_of(x, dispatch.needs_grad(*differentiable))
    chosen = dispatch.choose(_OP, facts, impl)
    norm = (num_groups, norm_weight, norm_bias, eps, scale, shift, silu, stats)
    convolution = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": padding_mode,
        "prefix": prefix, "channel_bias": channel_bias, "residual": residual, "stats_groups": stats_groups,
    }  # fmt: skip
    with registration.without_autocast(x):
        if facts.needs_grad:
            return checkpoint(chosen.call, x, weight, bias, norm, convolution, use_reentrant=False,
                              preserve_rng_state=False)  # fmt: skip
        return chosen.call(x, weight, bias, norm, convolution)


def _check_norm(
    x: torch.Tensor, num_groups: object, norm_weight: object, norm_bias: object, stats: object, scale: object,
    shift: object,
) -> None:  # fmt: skip
    batch, channels, frames = x.shape[:3]
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        checks.fail(_OP, "num_groups", f"a divisor of C = {channels}", num_groups)
    if x.numel() and x[0].numel() == num_groups:
        checks.fail(_OP, "x", "more than one value per group", f"shape {tuple(x.shape)} with {num_groups} groups")
    checks.parameter(_OP, "norm_weight", norm_weight, x, "x", (channels,), symbols="(C,)")
    checks.parameter(_OP, "norm_bias", norm_bias, x, "x", (channels,), symbols="(C,)")
    checks.parameter(_OP, "stats", stats, x, "x", (batch, num_groups, 2), symbols="(B, G, 2)")
    for name, value in (("scale", scale), ("shift", shift)):
        checks.parameter(_OP, name, value, x, "x", (batch, channels), (batch, channels, frames),
                         symbols="(B, C) or (B, C, T)")  # fmt: skip


def _call_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, norm: tuple[Any, ...], convolution: dict[str, Any]
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    num_groups, norm_weight, norm_bias, eps, scale, shift, silu, _ = norm
    return _reference(x, num_groups, norm_weight, norm_bias, weight, bias, eps, scale, shift, silu, **convolution)


def _call_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, norm: tuple[Any, ...], convolution: dict[str, Any]
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The norm's C++ kernel, and oneDNN's convolution."""
    num_groups, norm_weight, norm_bias, eps, scale, shift, silu, stats = norm
    h = group_norm_silu(
        x, num_groups, norm_weight, norm_bias, eps, scale=scale, shift=shift, silu=silu, stats=stats, impl="cpu"
    )
    return _reference_conv3d(h, weight, bias, **convolution)


dispatch.register(
    _OP,
    dispatch.Impl("cpu", registration.on_cpu, _call_cpu, frozenset({"x86_64"})),
    dispatch.Impl("reference", lambda facts: None, _call_reference),
)
