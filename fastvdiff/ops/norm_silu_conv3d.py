"""GroupNorm, modulation, SiLU and a 3-D convolution, with the activation recomputed in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from fastvdiff import checks, dispatch
from fastvdiff.reference.conv3d import are_channels_last, paddings, triple
from fastvdiff.reference.conv3d import conv3d as _reference_conv3d
from fastvdiff.reference.norm_silu_conv3d import norm_silu_conv3d as _reference

from . import registration
from .conv3d import (
    GEOMETRY,
    bias_gradients_of,
    conv3d,
    geometry_of,
    is_channels_last,
    result_like,
    shape_of,
    with_statistics,
)
from .conv3d_checks import convolution as check_convolution
from .conv3d_facts import on_cuda, options_of, race_class, size_keeping
from .group_norm_silu import group_norm_silu

_OP = "norm_silu_conv3d"
_CONVOLUTIONS = {"cpu": "cpu_winograd", "cuda": "cuda"}  # whose implementation of conv3d goes with the norm's


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
        impl: None, or the implementation to use, strictly: "cpu" (the norm's kernel, then `conv3d`'s or oneDNN's),
            "cuda" (with `stats` the norm is applied as the convolution reads it; else the two ops' kernels run one
            after the other), "unfused" (`group_norm_silu` and `conv3d`, each by its own choice) or "reference".

    Returns:
        As `conv3d`: y, or (y, statistics of y) with `stats_groups`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        NotImplementedError: `impl` does not support the call.

    Source: Wu & He, "Group Normalization", arXiv:1803.08494; the block of Ho et al., arXiv:2006.11239, appendix B.
    """
    out_sizes = check_convolution(_OP, x, weight, bias, stride, padding, dilation, groups, padding_mode, prefix,
                                  channel_bias, residual, stats_groups)  # fmt: skip
    _check_norm(x, num_groups, norm_weight, norm_bias, stats, scale, shift)
    x = x.to(registration.autocast_dtype(x))
    differentiable = (x, norm_weight, norm_bias, weight, bias, scale, shift, prefix, channel_bias, residual)
    facts = dispatch.facts_of(
        x, dispatch.needs_grad(*differentiable), given=stats is not None, num_groups=num_groups,
        **options_of(x.shape[0], weight, stride, dilation, groups, out_sizes,
                     channel_bias is not None or residual is not None, "replicate" in triple(padding_mode),
                     prefix is not None, stats_groups > 0),
    )  # fmt: skip
    chosen = dispatch.choose(_OP, facts, impl)
    norm = (num_groups, norm_weight, norm_bias, eps, scale, shift, silu, stats)
    convolution = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": padding_mode,
        "prefix": prefix, "channel_bias": channel_bias, "residual": residual, "stats_groups": stats_groups,
    }  # fmt: skip
    with registration.without_autocast(x):
        return chosen.call(facts, x, weight, bias, norm, convolution)


def _race_class(facts: dispatch.Facts) -> str:
    """Given statistics, those of the convolution; without, two kernels run as they would for the two ops."""
    return race_class(facts) if facts.options["given"] else "others"


def normalises_as_it_reads(x: torch.Tensor, weight: torch.Tensor, sums: bool) -> bool:
    """Whether, given x's statistics, one kernel would run a convolution that keeps T, H and W, its norm included.

    `sums`: the convolution has a channel bias or a residual.
    """
    return dispatch.would_run(_OP, size_keeping(x, weight, sums, given=True, num_groups=1)) == "cuda"


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


def _call_reference(facts: dispatch.Facts, *args: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    return _recomputing(facts, _plain, *args)


def _call_cpu(
    facts: dispatch.Facts, x: torch.Tensor, weight: torch.Tensor, bias: Any, norm: tuple[Any, ...],
    convolution: dict[str, Any],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The norm's C++ kernel, and the convolution's or oneDNN's."""
    if dispatch.would_run("conv3d", facts) == "cpu_winograd" and (
        not facts.needs_grad or _plainly_padded(facts, weight, convolution)
    ):
        return _call_kernel("cpu", x, weight, bias, norm, convolution)
    normalise = partial(group_norm_silu, impl="cpu")
    return _two_ops(facts, normalise, _reference_conv3d, x, weight, bias, norm, convolution)


def _recomputing(facts: dispatch.Facts, call: Any, *args: Any) -> Any:
    if facts.needs_grad:
        return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False)
    return call(*args)


def _plain(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, norm: tuple[Any, ...], convolution: dict[str, Any]
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    num_groups, norm_weight, norm_bias, eps, scale, shift, silu, _ = norm
    return _reference(x, num_groups, norm_weight, norm_bias, weight, bias, eps, scale, shift, silu, **convolution)


def _unfused(facts: dispatch.Facts) -> str | None:
    """One of the two ops at least has a kernel for its part."""
    options = {"num_groups": facts.options["num_groups"], "stats": facts.options["given"]}
    norm = dispatch.would_run("group_norm_silu", facts._replace(options=options))
    if norm == dispatch.would_run("conv3d", facts) == "reference":
        return "neither group_norm_silu nor conv3d has a kernel for it"
    return None


def _call_unfused(facts: dispatch.Facts, *args: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    return _two_ops(facts, group_norm_silu, conv3d, *args)


def _two_ops(
    facts: dispatch.Facts, normalise: Callable[..., torch.Tensor], convolve: Callable[..., Any], x: torch.Tensor,
    weight: torch.Tensor, bias: Any, norm: tuple[Any, ...], convolution: dict[str, Any],
) -> Any:  # fmt: skip
    """convolve(normalise(x)). With a gradient only x is kept.

    The convolution then keeps how h is computed instead of h, whatever view of it it saves. Where it would save
    something else, or hooks around the call (a checkpoint's, ...) decide on what is saved, it is computed again too.
    """
    num_groups, norm_weight, norm_bias, eps, scale, shift, silu, stats = norm
    options = {"scale": scale, "shift": shift, "silu": silu, "stats": stats}
    wishes = dispatch.wishes()

    def normalised(x: torch.Tensor) -> torch.Tensor:
        return normalise(x, num_groups, norm_weight, norm_bias, eps, **options)

    def both(x: torch.Tensor) -> Any:
        with dispatch.recalled(wishes):
            return convolve(normalised(x), weight, bias, **convolution)

    plain = facts.needs_grad and not torch.compiler.is_compiling() and not _hooked()
    if not plain or not _saves_a_view(facts, weight, convolution):
        return _recomputing(facts, both, x)
    h = normalised(x)
    memory = h.untyped_storage().data_ptr()

    def pack(saved: torch.Tensor) -> Any:
        if saved.untyped_storage().data_ptr() != memory:
            return saved
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f'{_OP}: its kernels have no second derivative; pass impl="reference" where one is needed'
            )
        with torch.no_grad(), registration.without_autocast(x), dispatch.recalled(wishes):
            return normalised(x).as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return convolve(h, weight, bias, **convolution)


def _saves_a_view(facts: dispatch.Facts, weight: torch.Tensor, convolution: dict[str, Any]) -> bool:
    """Whether a convolution saves its input, or a view of it, and no padded, widened or unfolded copy."""
    plain = _plainly_padded(facts, weight, convolution)
    return plain and (facts.device != "cpu" or are_channels_last(facts.shape, facts.strides))


def _plainly_padded(facts: dispatch.Facts, weight: torch.Tensor, convolution: dict[str, Any]) -> bool:
    """Whether torch's convolution pads by itself: zeros, as many in front as behind; on a CPU in float32 alone."""
    pads = paddings(convolution["padding"], tuple(weight.shape[2:]), triple(convolution["dilation"]))
    copied = facts.options["repeats"] or facts.options["prefix"] or pads[::2] != pads[1::2]
    return not copied and (facts.device != "cpu" or facts.dtype == torch.float32)


def _hooked() -> bool:
    """Whether saved tensors go through hooks; so too where torch does not say."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(False) is not None


def _call_cuda(facts: dispatch.Facts, *args: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    return _call_kernel("cuda", *args)


def _call_kernel(
    impl: str, x: torch.Tensor, weight: torch.Tensor, bias: Any, norm: tuple[Any, ...], convolution: dict[str, Any]
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One op whose backward computes h again, and not the convolution."""
    num_groups, norm_weight, norm_bias, eps, scale, shift, silu, stats = norm
    prefix, channel_bias, residual = (convolution[name] for name in ("prefix", "channel_bias", "residual"))
    recorded = dispatch.needs_grad(
        x, norm_weight, norm_bias, scale, shift, weight, bias, prefix, channel_bias, residual
    )
    geometry = geometry_of(weight, *(convolution[name] for name in ("stride", "padding", "dilation", "padding_mode")))
    stats_groups = convolution["stats_groups"]
    y, y_stats = registration.call(
        _forward_op, recorded, x, num_groups, norm_weight, norm_bias, eps, scale, shift, silu, stats, weight, bias,
        *geometry, prefix, channel_bias, residual, stats_groups if impl == "cuda" else 0, impl,
    )  # fmt: skip
    return with_statistics(y, y_stats, stats_groups, impl)


def _forward(
    x: torch.Tensor, num_groups: int, norm_weight: Any, norm_bias: Any, eps: float, scale: Any, shift: Any, silu: bool,
    stats: Any, weight: torch.Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, replicate: Any, prefix: Any,
    channel_bias: Any, residual: Any, stats_groups: int, impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    norm = (num_groups, norm_weight, norm_bias, eps, scale, shift, silu, stats)
    convolution = registration.backend(_CONVOLUTIONS[impl], "conv3d")
    geometry = convolution.Geometry(*map(tuple, (stride, padding, dilation, replicate)))
    out_size = shape_of(x, weight, stride, padding, dilation)[2:]
    rest = (weight, bias, geometry, prefix, channel_bias, residual, stats_groups, out_size, is_channels_last(x, weight))
    if stats is not None and impl == "cuda":
        return registration.backend(impl, _OP).forward(x, *norm, *rest)
    h, _ = registration.backend(impl, "group_norm_silu").forward(x, *norm)
    return convolution.forward(h, *rest)


def _fake_forward(
    x: torch.Tensor, num_groups: int, norm_weight: Any, norm_bias: Any, eps: float, scale: Any, shift: Any, silu: bool,
    stats: Any, weight: torch.Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, replicate: Any, prefix: Any,
    channel_bias: Any, residual: Any, stats_groups: int, impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return result_like(x, weight, stride, padding, dilation, stats_groups)


def _backward(
    grad: torch.Tensor, x: torch.Tensor, num_groups: int, norm_weight: Any, norm_bias: Any, eps: float, scale: Any,
    shift: Any, silu: bool, stats: Any, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any, replicate: Any,
    prefix: Any, needs_weight: bool, impl: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    norm = registration.backend(impl, "group_norm_silu")
    convolution = registration.backend(_CONVOLUTIONS[impl], "conv3d")
    geometry = convolution.Geometry(*map(tuple, (stride, padding, dilation, replicate)))
    grad = grad.to(x.dtype)
    h, moments = norm.forward(x, num_groups, norm_weight, norm_bias, eps, scale, shift, silu, stats)
    dweight = convolution.weight_gradient(grad, h, weight, geometry, prefix) if needs_weight else x.new_empty(0)
    if impl == "cpu":
        dh, dprefix = _direct_input_gradient(grad, h, weight, geometry), None
    else:
        dh, dprefix = convolution.input_gradient(grad, h, weight, geometry, prefix)
    dx, *parameters = norm.backward(dh, x, moments, num_groups, norm_weight, norm_bias, scale, shift, silu)
    return dx, *parameters, dweight, x.new_empty(0) if dprefix is None else dprefix


def _direct_input_gradient(grad: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, geometry: Any) -> torch.Tensor:
    """oneDNN's: where the gradient of the norm's bias or shift sums what cancels, filtering rounds too much.

    For what is `_plainly_padded`, at stride 1: the flipped kernel over grad, by the reference's choice of views. torch
    takes im2col for the gradient of one small clip.
    """
    weight, padding = weight.to(h.dtype), geometry.padding[::2]
    around = [k - 1 - p for k, p in zip(weight.shape[2:], padding, strict=True)]
    if min(around) >= 0:
        return _reference_conv3d(grad, weight.flip(2, 3, 4).transpose(0, 1), None, padding=around)
    return torch.ops.aten.convolution_backward(
        grad, h, weight, None, geometry.stride, padding, geometry.dilation, False, (0, 0, 0), 1, (True, False, False)
    )[0]  # fmt: skip


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, num_groups: int, norm_weight: Any, norm_bias: Any, eps: float, scale: Any,
    shift: Any, silu: bool, stats: Any, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any, replicate: Any,
    prefix: Any, needs_weight: bool, impl: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x),
        *(x.new_empty(0) if p is None else torch.empty_like(p, memory_format=contiguous)
          for p in (norm_weight, norm_bias, scale, shift)),
        torch.empty_like(weight, memory_format=contiguous) if needs_weight else x.new_empty(0),
        x.new_empty(0) if prefix is None else x.new_empty(prefix.shape),
    )  # fmt: skip


_NORM = (
    "Tensor x, int num_groups, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? scale, Tensor? shift,"
    " bool silu, Tensor? stats"
)
_forward_op = registration.define(
    f"norm_silu_conv3d({_NORM}, Tensor weight, Tensor? bias, {GEOMETRY}, Tensor? channel_bias, Tensor? residual,"
    " int stats_groups, str impl) -> (Tensor, Tensor)",
    kernel=_forward,
    fake=_fake_forward,
)
_backward_op = registration.define(
    f"norm_silu_conv3d_backward(Tensor grad, {_NORM}, Tensor weight, {GEOMETRY}, bool needs_weight, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    (x, ctx.num_groups, norm_weight, norm_bias, ctx.eps, scale, shift, ctx.silu, stats, weight, bias, *ctx.geometry,
     prefix, channel_bias, residual, _, ctx.impl) = inputs  # fmt: skip
    ctx.set_materialize_grads(False)  # the statistics have none
    ctx.sums = bias_gradients_of(bias, channel_bias)
    ctx.of_residual = None if residual is None else residual.dtype
    ctx.save_for_backward(x, norm_weight, norm_bias, scale, shift, stats, weight, prefix)


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x, norm_weight, norm_bias, scale, shift, stats, weight, prefix = ctx.saved_tensors
    norm = (ctx.num_groups, norm_weight, norm_bias, ctx.eps, scale, shift, ctx.silu, stats)
    needs_weight = ctx.needs_input_grad[9]
    dx, *parameters, dweight, dprefix = registration.call(
        _backward_op, torch.is_grad_enabled(), grad, x, *norm, weight, *ctx.geometry, prefix, needs_weight, ctx.impl
    )
    given = (norm_weight, norm_bias, scale, shift)
    dnorm_weight, dnorm_bias, dscale, dshift = (
        None if p is None else g for p, g in zip(given, parameters, strict=True)
    )
    dbias, dchannel_bias = ctx.sums(grad)
    return (
        dx, None, dnorm_weight, dnorm_bias, None, dscale, dshift, None, None, dweight if needs_weight else None, dbias,
        None, None, None, None, None if prefix is None else dprefix.to(prefix.dtype), dchannel_bias,
        None if ctx.of_residual is None else grad.to(ctx.of_residual), None, None,
    )  # fmt: skip


registration.differentiable(
    _forward_op, setup_context=_setup_context, backward=_differentiate, backward_op=_backward_op
)
dispatch.register(
    _OP,
    dispatch.Impl("cpu", registration.on_cpu, _call_cpu, frozenset({"x86_64"})),
    dispatch.Impl("cuda", on_cuda, _call_cuda, frozenset(), tf32=True, raced=_race_class),
    dispatch.Impl("unfused", _unfused, _call_unfused),
    dispatch.Impl("reference", lambda facts: None, _call_reference),
)
