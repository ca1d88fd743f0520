"""3-D convolution with padding on each side, bias per sample, residual and statistics for the next norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fastvdiff import dispatch
from fastvdiff.reference.conv3d import conv3d as _reference
from fastvdiff.reference.conv3d import is_channels_last as _has_channels_last
from fastvdiff.reference.conv3d import moments, output_sizes, paddings, triple

from . import registration
from .conv3d_checks import convolution as check_convolution
from .conv3d_facts import (
    left_to_portable,
    on_cpu_winograd,
    on_cuda,
    on_hopper,
    options_of,
    race_class,
    size_keeping,
    slower_than_direct,
)

_OP = "conv3d"


def conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str | Sequence[str] = "zeros",
    prefix: torch.Tensor | None = None,
    channel_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    stats_groups: int = 0,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """3-D convolution (cross-correlation), with what usually stands around it.

    Equivalent to::

        h = F.pad(x, (w0, w1, h0, h1, t0, t1), mode)
        y = F.conv3d(h, weight, bias, stride, 0, dilation, groups)
        y = y + channel_bias        # over space, or over time and space
        y = y + residual

    Parameters are used in x's dtype; under autocast the result has autocast's dtype.

    Args:
        x: (B, C, T, H, W), float32, bfloat16, float16 or float64, any strides.
        weight: (C_out, C / groups, kT, kH, kW), any floating dtype.
        bias: (C_out,), any floating dtype, or None.
        stride, dilation: one positive number, or one for each of (t, h, w).
        padding: one number, (t, h, w), or (t0, t1, h0, h1, w0, w1) with the two sides of each dimension, so that
            (k - 1, 0, ...) is causal in time; "same" (stride 1; an odd one goes behind) or "valid" (none).
        groups: divides C and C_out.
        padding_mode: "zeros" or "replicate" (the edge's values again), or one of them for each of (t, h, w).
        prefix: (B, C, t0, H, W), the frames before x, in place of the front temporal padding: streamed decoding.
        channel_bias: (B, C_out) or (B, C_out, T_out), any floating dtype.
        residual: like the result, any floating dtype.
        stats_groups: above 0, the statistics of the result in that many groups of channels come too.
        impl: None, or the implementation to use, strictly: "cpu_winograd" (kernels of (k, 3, 3) and (3, 1, 1), stride
            and dilation 1, groups = 1, no prefix, "replicate" without a gradient: a quarter of a direct sum's products
            over space, half over time, twice its rounding error in float32; what is not finite reaches its whole tile
            of 4 x 4 outputs, or 4 frames), "cuda" (groups = 1; float32 is multiplied as tf32, where
            `torch.backends.cudnn.conv.fp32_precision` is "tf32"), "cuda_sm90" (compute capability 9.0; bfloat16 and
            float16 in channels_last_3d; the forward and, at stride 1, x's gradient of calls with zeros as padding and
            without prefix and statistics: for others it runs what "cuda" runs; the weight's gradient is cuDNN's),
            "cuda_sm90_cluster" (the same on clusters of blocks) or "reference".

    Returns:
        (B, C_out, T_out, H_out, W_out) in x's dtype; channels_last_3d if x or the weight is, else contiguous (where
        both fit, C = 1 or T*H*W = 1, a tensor counts as contiguous). With `stats_groups` = G, a pair: that and
        (B, G, 2) float32 (float64 for float64 inputs), mean and centred sum of squares of each group, constants to
        autograd, as `group_norm_silu(stats=...)` takes them.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        NotImplementedError: `impl` does not support the call.

    Source: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308 ("cpu_winograd").
    """
    key = None
    if prefix is None and not stats_groups:
        key = _key(x, weight, bias, channel_bias, residual, stride, padding, dilation, groups, padding_mode, impl)
    if key in _CALLS:
        return _CALLS[key](x, weight, bias, channel_bias, residual)
    out_sizes = check_convolution(_OP, x, weight, bias, stride, padding, dilation, groups, padding_mode, prefix,
                                  channel_bias, residual, stats_groups)  # fmt: skip
    x = x.to(registration.autocast_dtype(x))
    facts = dispatch.facts_of(
        x, dispatch.needs_grad(x, weight, bias, prefix, channel_bias, residual),
        **options_of(x.shape[0], weight, stride, dilation, groups, out_sizes,
                     channel_bias is not None or residual is not None, "replicate" in triple(padding_mode),
                     prefix is not None, stats_groups > 0),
    )  # fmt: skip
    chosen = dispatch.choose(_OP, facts, impl)
    if key is not None and chosen.name == "cpu_winograd" and x.shape[0]:
        _remember(key, x, weight, channel_bias, residual, padding, padding_mode, out_sizes)
    with registration.without_autocast(x):
        return chosen.call(x, weight, bias, stride, padding, dilation, groups, padding_mode, prefix, channel_bias,
                           residual, stats_groups)  # fmt: skip


# ---- calls that come again -------------------------------------------------------------------------------------------

_CALLS: dict[Any, Callable[..., torch.Tensor]] = {}
_MOST_CALLS = 1024


def _key(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, channel_bias: Any, residual: Any, *options: Any
) -> tuple[Any, ...] | None:
    """All that a plain call on a CPU depends on but its tensors' values; None for any other call.

    Plain: float32, no gradient, nobody watching. A network asks for the same convolutions in every step, and to check,
    choose and prepare one costs as much time as 10 MFLOP.
    """
    if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor) or not x.is_cpu:
        return None
    tensors = tuple(t for t in (x, weight, bias, channel_bias, residual) if t is not None)
    if not registration.plain(tensors) or dispatch.watched():
        return None
    if any(t is not None and (t.dim() > 2 or not t.is_contiguous()) for t in (bias, channel_bias)):
        return None
    places = tuple(None if t is None else (t.shape, t.stride()) for t in (x, weight, bias, channel_bias, residual))
    return (*places, repr(options), torch.get_num_threads(), registration.isa())  # 1 and 1.0 are two options


def _remember(
    key: tuple[Any, ...], x: torch.Tensor, weight: torch.Tensor, channel_bias: Any, residual: Any, padding: Any,
    padding_mode: Any, out_sizes: tuple[int, int, int],
) -> None:  # fmt: skip
    """From now on a call of this key goes straight to the kernel."""
    if len(_CALLS) >= _MOST_CALLS:
        _CALLS.clear()
    kernels = registration.backend("cpu_winograd", _OP)
    geometry = kernels.Geometry(*map(tuple, geometry_of(weight, 1, padding, 1, padding_mode)))
    by_frame = None if channel_bias is None else channel_bias[:, None]
    _CALLS[key] = kernels.Call(x, weight, by_frame, residual, geometry, out_sizes, is_channels_last(x, weight))


def impl_of(x: torch.Tensor, weight: torch.Tensor, sums: bool) -> str:
    """What would run a convolution that keeps T, H and W; x (B, C, T, H, W) is laid out like the input.

    The input's channels are the weight's. `sums`: it has a channel bias or a residual. The kernels of "cuda" leave the
    statistics of their result for nothing.
    """
    return dispatch.would_run(_OP, size_keeping(x, weight, sums))


def _call_kernel(
    impl: str, x: torch.Tensor, weight: torch.Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int,
    padding_mode: Any, prefix: Any, channel_bias: Any, residual: Any, stats_groups: int,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    recorded = dispatch.needs_grad(x, weight, bias, prefix, channel_bias, residual)
    geometry = geometry_of(weight, stride, padding, dilation, padding_mode)
    y, stats = registration.call(_forward_op, recorded, x, weight, bias, *geometry, prefix, channel_bias, residual,
                                 0 if impl == "cpu_winograd" else stats_groups, impl)  # fmt: skip
    return with_statistics(y, stats, stats_groups, impl)


def with_statistics(
    y: torch.Tensor, stats: torch.Tensor, stats_groups: int, impl: str
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y, with its statistics where they were asked for: those of a CUDA kernel, on a CPU worked out from y."""
    if not stats_groups:
        return y
    return y, stats.detach() if impl.startswith("cuda") else moments(y, stats_groups)


def geometry_of(
    weight: torch.Tensor, stride: Any, padding: Any, dilation: Any, padding_mode: Any
) -> tuple[list[int], list[int], list[int], list[bool]]:
    """Stride, (t0, t1, h0, h1, w0, w1), dilation, and which dimensions repeat their edge: the native ops' arguments."""
    dilation = triple(dilation)
    replicate = [mode == "replicate" for mode in triple(padding_mode)]
    return list(triple(stride)), list(paddings(padding, tuple(weight.shape[2:]), dilation)), list(dilation), replicate


def shape_of(x: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any) -> tuple[int, ...]:
    """(B, C_out, T_out, H_out, W_out)."""
    sizes = output_sizes(tuple(x.shape[2:]), tuple(weight.shape[2:]), stride, padding, dilation)
    return (x.shape[0], weight.shape[0], *sizes)


def is_channels_last(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the result is channels_last_3d."""
    return _has_channels_last(x) or _has_channels_last(weight)


def result_like(
    x: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any, stats_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised result and statistics."""
    memory_format = torch.channels_last_3d if is_channels_last(x, weight) else torch.contiguous_format
    shape = shape_of(x, weight, stride, padding, dilation)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    return y, x.new_empty((x.shape[0], stats_groups, 2), dtype=torch.float32)


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, replicate: Any,
    prefix: Any, channel_bias: Any, residual: Any, stats_groups: int, impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    kernels = registration.backend(impl, _OP)
    geometry = kernels.Geometry(*map(tuple, (stride, padding, dilation, replicate)))
    out_size = shape_of(x, weight, stride, padding, dilation)[2:]
    return kernels.forward(x, weight, bias, geometry, prefix, channel_bias, residual, stats_groups, out_size,
                           is_channels_last(x, weight))  # fmt: skip


def _fake_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, replicate: Any,
    prefix: Any, channel_bias: Any, residual: Any, stats_groups: int, impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return result_like(x, weight, stride, padding, dilation, stats_groups)


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any, replicate: Any,
    prefix: Any, needs_input: bool, needs_weight: bool, impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    kernels = registration.backend(impl, _OP)
    geometry = kernels.Geometry(*map(tuple, (stride, padding, dilation, replicate)))
    grad = grad.to(x.dtype)
    absent = x.new_empty(0)
    dx, dprefix = kernels.input_gradient(grad, x, weight, geometry, prefix) if needs_input else (absent, absent)
    dweight = kernels.weight_gradient(grad, x, weight, geometry, prefix) if needs_weight else weight.new_empty(0)
    return dx, dweight, absent if dprefix is None else dprefix


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any, replicate: Any,
    prefix: Any, needs_input: bool, needs_weight: bool, impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x) if needs_input else x.new_empty(0),
        torch.empty_like(weight, memory_format=contiguous) if needs_weight else weight.new_empty(0),
        x.new_empty(0) if prefix is None or not needs_input else x.new_empty(prefix.shape),
    )


GEOMETRY = "int[] stride, int[] padding, int[] dilation, bool[] replicate, Tensor? prefix"
_forward_op = registration.define(
    f"conv3d(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY}, Tensor? channel_bias, Tensor? residual,"
    " int stats_groups, str impl) -> (Tensor, Tensor)",
    kernel=_forward,
    fake=_fake_forward,
)
_backward_op = registration.define(
    f"conv3d_backward(Tensor grad, Tensor x, Tensor weight, {GEOMETRY}, bool needs_input, bool needs_weight, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, *ctx.geometry, prefix, channel_bias, residual, _, ctx.impl = inputs
    ctx.set_materialize_grads(False)  # the statistics have none
    ctx.sums = bias_gradients_of(bias, channel_bias)
    ctx.of_residual = None if residual is None else residual.dtype
    ctx.save_for_backward(x, weight, prefix)


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x, weight, prefix = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needs_input, needs_weight, needs_prefix = needs[0] or needs[7], needs[1], needs[7]
    if ctx.impl == "cpu_winograd" and torch.is_grad_enabled():
        dx, dweight, dprefix = *_gradients_to_differentiate(ctx, grad, x, weight), None
    else:
        dx, dweight, dprefix = registration.call(
            _backward_op, torch.is_grad_enabled(), grad, x, weight, *ctx.geometry, prefix, needs_input, needs_weight,
            ctx.impl,
        )  # fmt: skip
    dbias, dchannel_bias = ctx.sums(grad)
    return (
        dx if needs[0] else None, dweight if needs_weight else None, dbias, None, None, None, None,
        dprefix.to(prefix.dtype) if needs_prefix else None, dchannel_bias,
        None if ctx.of_residual is None else grad.to(ctx.of_residual), None, None,
    )  # fmt: skip


def _gradients_to_differentiate(
    ctx: Any, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dx and dweight by the reference, with a graph of their own: for a second derivative."""
    stride, padding, dilation, _ = ctx.geometry
    wanted = [t for t, needed in zip((x, weight), ctx.needs_input_grad, strict=False) if needed]
    y = _reference(x, weight, None, stride, padding, dilation)
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True) if wanted else ())
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad[:2])


def bias_gradients_of(bias: torch.Tensor | None, channel_bias: torch.Tensor | None) -> Callable[..., Any]:
    """What gives (dbias, dchannel_bias) for dy, which it reads once; it keeps neither tensor."""
    of_bias = None if bias is None else bias.dtype
    of_channel_bias = None if channel_bias is None else (channel_bias.dim(), channel_bias.dtype)

    def sums(grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if of_bias is None and of_channel_bias is None:
            return None, None
        # A result whose channels lie as the gradient's do is read in whole lines: eight times as fast.
        if _has_channels_last(grad):
            by_frame = grad.permute(0, 2, 3, 4, 1).sum((2, 3), dtype=torch.float32).transpose(1, 2)  # (B, K, T)
        else:
            by_frame = grad.sum((3, 4), dtype=torch.float32)
        dbias = None if of_bias is None else by_frame.sum((0, 2)).to(of_bias)
        if of_channel_bias is None:
            return dbias, None
        return dbias, (by_frame if of_channel_bias[0] == 3 else by_frame.sum(2)).to(of_channel_bias[1])

    return sums


registration.differentiable(
    _forward_op, setup_context=_setup_context, backward=_differentiate, backward_op=_backward_op
)
dispatch.register(
    _OP,
    dispatch.Impl(
        "cpu_winograd",
        on_cpu_winograd,
        partial(_call_kernel, "cpu_winograd"),
        frozenset({"x86_64"}),
        slower_than_direct,
    ),
    # Before the portable kernels: on an H100 two to three times as fast.
    dispatch.Impl(
        "cuda_sm90", on_hopper, partial(_call_kernel, "cuda_sm90"), frozenset(), left_to_portable, raced=race_class
    ),
    dispatch.Impl("cuda", on_cuda, partial(_call_kernel, "cuda"), frozenset(), tf32=True, raced=race_class),
    dispatch.Impl(
        "cuda_sm90_cluster", on_hopper, partial(_call_kernel, "cuda_sm90_cluster"), frozenset(), untried=True
    ),
    dispatch.Impl("reference", lambda facts: None, _reference),
)  # fmt: skip
