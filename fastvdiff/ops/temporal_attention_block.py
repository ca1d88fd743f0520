"""The whole temporal attention block: norm, projections, attention over frames, output projection, residual."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from fastvdiff import checks, dispatch
from fastvdiff.reference.temporal_attention_block import temporal_attention_block as _reference

from . import attention_checks, registration
from .temporal_attention import temporal_attention

_OP = "temporal_attention_block"
_NORMS = ("layer_norm", "rms_norm")
_LANES = 16
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def temporal_attention_block(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    out_weight: torch.Tensor,
    *,
    heads: int,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    v_bias: torch.Tensor | None = None,
    out_bias: torch.Tensor | None = None,
    norm: str | None = "layer_norm",
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    frame_embedding: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_style: str = "interleaved",
    scale: float | None = None,
    is_causal: bool = False,
    residual: bool = True,
    impl: str | None = None,
) -> torch.Tensor:
    """Pre-norm self-attention over the frames at every position, with its projections and residual, in one op.

    Equivalent eager code::

        h = x.movedim(1, -1).flatten(2, 3)                                 # (B, T, S, C) with S = H*W, a copy
        h = F.layer_norm(h, (C,), norm_weight, norm_bias, eps)             # or F.rms_norm(h, (C,), norm_weight, eps)
        h = h + frame_embedding[:, None]
        q, k, v = (F.linear(h, w, b).unflatten(-1, (heads, -1)) for w, b in (q_weight, q_bias), ...)
        y = fastvdiff.ops.temporal_attention(q, k, v, attn_bias=attn_bias, ...)
        y = F.linear(y.flatten(3), out_weight, out_bias)
        return x + y.unflatten(2, (H, W)).movedim(-1, 1)

    Nothing of the size of q, k or v is stored for the whole clip, and x is all that is saved for the backward. Under
    autocast the result has autocast's dtype and the parameters are used as they are.

    Args:
        x: (B, C, T, H, W), float32, bfloat16, float16 or float64, any strides.
        q_weight, k_weight, v_weight: (heads*D, C) each, any floating dtype; heads*D need not be C.
        out_weight: (C, heads*D).
        heads: number of heads; divides the rows of q_weight.
        q_bias, k_bias, v_bias: (heads*D,) each, or None.
        out_bias: (C,) or None.
        norm: over C: "layer_norm", "rms_norm" (`torch.nn.functional.rms_norm`: eps is added to the mean square) or
            None.
        norm_weight: (C,) or None.
        norm_bias: (C,) or None; "layer_norm" only.
        eps: of the norm.
        frame_embedding: (T, C) added after the norm, or None.
        attn_bias: (heads, T, T) added to the scores, or None.
        attn_mask: (B, T) or (B, T, T) bool, True where a query may attend, or None. A query with no frame allowed
            gives zeros to the output projection.
        rotary: (cos, sin), each (L, R/2) float32 or float64 with L >= T and R <= D, or None. No gradient.
        rotary_style: "interleaved" turns dimension 2i with 2i + 1, "half" turns i with i + R/2.
        scale: factor of the scores, 1/sqrt(D) if None.
        is_causal: frame t attends to frames 0 .. t.
        residual: add x to the result.
        impl: None, or the implementation to use, strictly: "cpu", "triton", "unfused" (torch's norm and projections
            around `temporal_attention`'s kernel, where it has one) or "reference".

    Returns:
        A tensor of x's shape, memory format and dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        NotImplementedError: `impl` does not support the call.

    Source: Ho et al., "Video Diffusion Models", arXiv:2204.03458, section 3 (temporal attention); Zhang & Sennrich,
    arXiv:1910.07467, eq. 4 (RMS norm); Su et al., arXiv:2104.09864, eq. 34 (rotary positions).
    """
    _check_weights(x, q_weight, k_weight, v_weight, out_weight, heads, q_bias, k_bias, v_bias, out_bias)
    _check_norm(x, norm, norm_weight, norm_bias, frame_embedding)
    batch, frames, dim = x.shape[0], x.shape[2], q_weight.shape[0] // heads
    attention_checks.scores(_OP, attn_bias, attn_mask, scale, x, "x", (batch, heads, frames, frames), "T")
    attention_checks.rotary(_OP, rotary, rotary_style, x, "x", frames, "T", dim)
    x = x.to(registration.autocast_dtype(x))
    parameters = (q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias, norm_weight, norm_bias,
                  frame_embedding, attn_bias)  # fmt: skip
    facts = dispatch.facts_of(x, dispatch.needs_grad(x, *parameters), heads=heads, inner=q_weight.shape[0])
    chosen = dispatch.choose(_OP, facts, impl)
    with registration.without_autocast(x):
        return chosen.call(
            x, q_weight, k_weight, v_weight, out_weight, heads, q_bias, k_bias, v_bias, out_bias, norm, norm_weight,
            norm_bias, eps, frame_embedding, attn_bias, attn_mask, rotary, rotary_style, scale, is_causal, residual,
        )  # fmt: skip


def _check_weights(
    x: object, q_weight: object, k_weight: object, v_weight: object, out_weight: object, heads: object, q_bias: object,
    k_bias: object, v_bias: object, out_bias: object,
) -> None:  # fmt: skip
    checks.tensor(_OP, "x", x)
    checks.floating(_OP, "x", x)
    if x.dim() != 5:
        checks.fail(_OP, "x", "5 dimensions (B, C, T, H, W)", f"shape {tuple(x.shape)}")
    channels = x.shape[1]
    checks.tensor(_OP, "q_weight", q_weight)
    if q_weight.dim() != 2 or q_weight.shape[1] != channels:
        checks.fail(_OP, "q_weight", f"shape (heads*D, C) with C = {channels}", tuple(q_weight.shape))
    inner = q_weight.shape[0]
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or inner % heads or inner == 0:
        checks.fail(_OP, "heads", f"a positive divisor of q_weight's {inner} rows", checks.describe(heads))
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight), ("v_weight", v_weight)):
        checks.tensor(_OP, name, weight)
        checks.parameter(_OP, name, weight, x, "x", (inner, channels), symbols="(heads*D, C)")
    checks.tensor(_OP, "out_weight", out_weight)
    checks.parameter(_OP, "out_weight", out_weight, x, "x", (channels, inner), symbols="(C, heads*D)")
    for name, bias in (("q_bias", q_bias), ("k_bias", k_bias), ("v_bias", v_bias)):
        checks.parameter(_OP, name, bias, x, "x", (inner,), symbols="(heads*D,)")
    checks.parameter(_OP, "out_bias", out_bias, x, "x", (channels,), symbols="(C,)")


def _check_norm(x: torch.Tensor, norm: object, weight: object, bias: object, frame_embedding: object) -> None:
    if norm is not None and norm not in _NORMS:
        checks.fail(_OP, "norm", "'layer_norm', 'rms_norm' or None", checks.describe(norm))
    if norm is None and weight is not None:
        checks.fail(_OP, "norm_weight", "None, as norm is None", checks.describe(weight))
    if norm != "layer_norm" and bias is not None:
        checks.fail(_OP, "norm_bias", f"None, as norm is {norm!r}", checks.describe(bias))
    channels, frames = x.shape[1:3]
    checks.parameter(_OP, "norm_weight", weight, x, "x", (channels,), symbols="(C,)")
    checks.parameter(_OP, "norm_bias", bias, x, "x", (channels,), symbols="(C,)")
    checks.parameter(_OP, "frame_embedding", frame_embedding, x, "x", (frames, channels), symbols="(T, C)")


def _triton_supports(facts: dispatch.Facts) -> str | None:
    channels, frames = facts.shape[1:3]
    dim = facts.options["inner"] // facts.options["heads"]
    for what, size, most in (("channels", channels, 320), ("frames", frames, 64), ("a head dimension D", dim, 128)):
        if size > most:
            return f"{what} up to {most}, not {size}: norm, projections and attention by themselves go further"
    return registration.on_triton(facts)


def _slower(facts: dispatch.Facts) -> str | None:
    """The classes in which the kernel lost on x86: with AVX-512 against the reference, with AVX2 against "unfused"."""
    channels, positions = facts.shape[1], facts.shape[3] * facts.shape[4]
    lanes = -(-positions // _LANES) * _LANES
    # Lanes past the last position do work that is thrown away; the wider the projections, the more it weighs.
    if positions < (0.7 if channels <= 128 else 0.8) * lanes:
        return f"slower here: {positions} positions would fill too few of {lanes} lanes"
    if facts.dtype == torch.float32 and channels > 128 and not _AVX512:
        return f"slower here: float32 projections of {channels} channels, more than 128 without AVX-512"
    # The backward computes q, k and v again: beyond this the projections are all of the time.
    if facts.needs_grad and channels > 512:
        return f"slower here: a backward with {channels} channels, more than 512"
    if facts.dtype == torch.bfloat16 and not facts.needs_grad and channels > 256:
        return f"slower here: bfloat16 projections of {channels} channels, more than 256"
    return None


def _slower_on_gpu(facts: dispatch.Facts) -> str | None:
    """Wide projections: with 320 channels an H100 took 1.9 times the reference's time, in channels_last 0.8 times."""
    if facts.shape[1] > 128:
        return f"slower here: projections of {facts.shape[1]} channels, more than 128"
    return registration.interpreted(facts)


def _unfused(facts: dispatch.Facts) -> str | None:
    """Norm and projections are torch's; what is asked for is a kernel of the attention between them."""
    batch, _, frames, height, width = facts.shape
    inner, heads = facts.options["inner"], facts.options["heads"]
    shape = (batch, frames, height * width, heads, inner // heads)
    attention = dispatch.contiguous_facts(facts.device, facts.dtype, shape, facts.needs_grad, keys=frames)
    none = dispatch.would_run("temporal_attention", attention) == "reference"
    return "temporal_attention has no kernel for it either" if none else None


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, mask: Any, rotary: Any, style: str, k_offset: int,
    scale: float | None, is_causal: bool,
) -> torch.Tensor:  # fmt: skip
    return temporal_attention(q, k, v, attn_bias=bias, attn_mask=mask, rotary=rotary, rotary_style=style,
                              k_offset=k_offset, scale=scale, is_causal=is_causal)  # fmt: skip


def _call_kernel(
    impl: str, x: torch.Tensor, q_weight: Any, k_weight: Any, v_weight: Any, out_weight: Any, heads: int, q_bias: Any,
    k_bias: Any, v_bias: Any, out_bias: Any, norm: str | None, norm_weight: Any, norm_bias: Any, eps: float,
    frame_embedding: Any, attn_bias: Any, attn_mask: Any, rotary: Any, rotary_style: str, scale: float | None,
    is_causal: bool, residual: bool,
) -> torch.Tensor:  # fmt: skip
    parameters = [q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, out_weight, out_bias, norm_weight, norm_bias,
                  frame_embedding, attn_bias]  # fmt: skip
    cos, sin = (None, None) if rotary is None else rotary
    if scale is None:
        scale = 1.0 / math.sqrt(q_weight.shape[0] // heads)
    options = (heads, norm, eps, attn_mask, cos, sin, rotary_style, scale, is_causal, residual, impl)
    return registration.call(_forward_op, dispatch.needs_grad(x, *parameters), x, *parameters, *options)


_PARAMETERS = 12


def _forward(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    *arguments, impl = arguments
    return registration.backend(impl, _OP).forward(x, arguments[:_PARAMETERS], *arguments[_PARAMETERS:])


def _fake_forward(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _backward(grad: torch.Tensor, wanted: list[bool], x: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    *arguments, impl = arguments
    parameters, options = arguments[:_PARAMETERS], arguments[_PARAMETERS:]
    return registration.backend(impl, _OP).backward(grad, x, parameters, wanted, *options)


def _fake_backward(grad: torch.Tensor, wanted: list[bool], x: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    gradients = [
        torch.empty_like(p, memory_format=torch.contiguous_format) if want and p is not None else x.new_empty(0)
        for want, p in zip(wanted, arguments[:_PARAMETERS], strict=True)
    ]
    return [torch.empty_like(x), *gradients]


_ARGUMENTS = (
    "Tensor x, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias,"
    " Tensor out_weight, Tensor? out_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? frame_embedding,"
    " Tensor? attn_bias, int heads, str? norm, float eps, Tensor? attn_mask, Tensor? cos, Tensor? sin,"
    " str rotary_style, float scale, bool is_causal, bool residual,"
    " str impl"
)
_forward_op = registration.define(
    f"temporal_attention_block({_ARGUMENTS}) -> Tensor", kernel=_forward, fake=_fake_forward
)
_backward_op = registration.define(
    f"temporal_attention_block_backward(Tensor grad, bool[] wanted, {_ARGUMENTS}) -> Tensor[]",
    kernel=_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, torch.Tensor)))
    # Tensors are kept apart from the rest: None marks where each goes.
    ctx.is_tensor = [isinstance(a, torch.Tensor) for a in inputs]
    ctx.others = [None if isinstance(a, torch.Tensor) else a for a in inputs]


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    arguments = [next(saved) if kept else a for kept, a in zip(ctx.is_tensor, ctx.others, strict=True)]
    wanted = list(ctx.needs_input_grad[1 : 1 + _PARAMETERS])
    dx, *gradients = registration.call(_backward_op, torch.is_grad_enabled(), grad, wanted, *arguments)
    rest = len(arguments) - 1 - _PARAMETERS
    return dx, *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * rest


registration.differentiable(
    _forward_op, setup_context=_setup_context, backward=_differentiate, backward_op=_backward_op
)
dispatch.register(
    _OP,
    dispatch.Impl("cpu", registration.on_cpu, partial(_call_kernel, "cpu"), frozenset({"x86_64"}), _slower),
    dispatch.Impl("triton", _triton_supports, partial(_call_kernel, "triton"), frozenset(), slower=_slower_on_gpu),
    dispatch.Impl("unfused", _unfused, partial(_reference, attend=_attend)),
    dispatch.Impl("reference", lambda facts: None, _reference),
)
