"""Attention over frames at each position: checks, choice of implementation, registration."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from fastvdiff import checks, dispatch
from fastvdiff.reference.temporal_attention import temporal_attention as _reference

from . import attention_checks, registration

_OP = "temporal_attention"
_LANES = 16  # positions of an AVX-512 vector


def temporal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attn_bias: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_style: str = "interleaved",
    k_offset: int = 0,
    scale: float | None = None,
    is_causal: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Softmax attention along the frame axis, at every position and head by itself, without permutation copies.

    Equivalent eager code, for each of q, k and v in turn::

        x = x.permute(0, 2, 3, 1, 4).flatten(0, 1)               # (B*S, heads, T, D), a copy
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, is_causal=is_causal, scale=scale)
        y = y.unflatten(0, (B, S)).permute(0, 3, 1, 2, 4)        # (B, T, S, heads, D), another

    Args:
        q: (B, T, S, heads, D) queries with S = H*W positions, of any strides: a view of the caller's own layout.
            float32, bfloat16, float16 or float64; softmax and sums are held in float32 (float64 for float64).
        k: (B, Tk, S, heads, D) keys, of q's dtype and device.
        v: (B, Tk, S, heads, D) values, of q's dtype and device.
        attn_bias: (heads, T, Tk) added to the scores, of any float dtype; has a gradient.
        attn_mask: (B, Tk) or (B, T, Tk) bool, True where a query may attend. A query with no key allowed gives 0 and
            takes part in no gradient.
        rotary: (cos, sin), each (L, R/2) float32 or float64 with R <= D: q and k are turned on their first R
            dimensions by their frame's row, L >= max(T, k_offset + Tk). No gradient.
        rotary_style: "interleaved" turns dimension 2i with 2i + 1, "half" turns i with i + R/2.
        k_offset: row of the rotary table of the first key (queries start at row 0).
        scale: factor of the scores, from 0 upward; 1/sqrt(D) if None.
        is_causal: query t attends to keys 0 .. t (counted from the upper left, whatever Tk and k_offset).
        impl: run this implementation ("cpu", "triton", "reference") or raise NotImplementedError.

    Returns:
        (B, T, S, heads, D) of q's dtype (the autocast dtype under autocast), with the strides of `torch.empty_like(q)`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape.
        NotImplementedError: `impl` cannot run this call.

    Video diffusion models, Ho et al. 2022 (arXiv:2204.03458), section 3; rotary positions, Su et al. 2021
    (arXiv:2104.09864), eq. 34.
    """
    _check(q, k, v, attn_bias, attn_mask, rotary, rotary_style, k_offset, scale)
    dtype = registration.autocast_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    facts = dispatch.facts_of(q, dispatch.needs_grad(q, k, v, attn_bias), keys=k.shape[1])
    chosen = dispatch.choose(_OP, facts, impl)
    with registration.without_autocast(q):
        return chosen.call(q, k, v, attn_bias, attn_mask, rotary, rotary_style, k_offset, scale, is_causal)


def _check(
    q: object, k: object, v: object, bias: object, mask: object, rotary: object, style: object, k_offset: object,
    scale: object,
) -> None:  # fmt: skip
    """Refuse every argument that is not what the docstring says, by name."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        checks.tensor(_OP, name, value)
        checks.floating(_OP, name, value)
        if value.dim() != 5:
            checks.fail(_OP, name, "5 dimensions (B, T, S, heads, D)", f"shape {tuple(value.shape)}")
        checks.same_device(_OP, name, value, q, "q")
        if registration.autocast_dtype(value) != registration.autocast_dtype(q):
            checks.same_dtype(_OP, name, value, q, "q")
    batch, frames, positions, heads, dim = q.shape
    keys = k.shape[1]
    if dim == 0:
        checks.fail(_OP, "q", "a head dimension D of at least 1", f"shape {tuple(q.shape)}")
    for name, value in (("k", k), ("v", v)):
        checks.shape(_OP, name, value, (batch, keys, positions, heads, dim), symbols="(B, Tk, S, heads, D)")
    if isinstance(k_offset, bool) or not isinstance(k_offset, int) or k_offset < 0:
        checks.fail(_OP, "k_offset", "an int from 0 upward", checks.describe(k_offset))
    attention_checks.scores(_OP, bias, mask, scale, q, "q", (batch, heads, frames, keys), "Tk")
    rows = max(frames, k_offset + keys)
    attention_checks.rotary(_OP, rotary, style, q, "q", rows, "max(T, k_offset + Tk)", dim)


def _triton_supports(facts: dispatch.Facts) -> str | None:
    frames, dim = facts.shape[1], facts.shape[4]
    longest = max(frames, facts.options["keys"])
    if longest > 256:
        return f"up to 256 frames, not {longest}"
    if dim > 160:
        return f"a head dimension D of up to 160, not {dim}"
    return registration.on_triton(facts)


def _slower(facts: dispatch.Facts) -> str | None:
    """The classes in which the kernel lost against torch on x86 with AVX-512, forward or forward and backward."""
    positions = facts.shape[2]
    lanes = -(-positions // _LANES) * _LANES
    # Where dims are neighbours, positions are no lanes.
    if facts.strides[4] != 1 and positions < 0.4 * lanes:
        return f"slower here: {positions} positions would fill too few of {lanes} lanes"
    return None


def _call_kernel(
    impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, mask: Any, rotary: Any, style: str,
    k_offset: int, scale: float | None, is_causal: bool,
) -> torch.Tensor:  # fmt: skip
    cos, sin = (None, None) if rotary is None else rotary
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    arguments = (q, k, v, bias, mask, cos, sin, style == "interleaved", k_offset, scale, is_causal, impl)
    return registration.call(_forward_op, dispatch.needs_grad(q, k, v, bias), *arguments)


def _forward(*arguments: Any) -> torch.Tensor:
    *arguments, impl = arguments
    return registration.backend(impl, _OP).forward(*arguments)


def _fake_forward(q: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return torch.empty_like(q)


def _backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *arguments, impl = arguments
    return registration.backend(impl, _OP).backward(*arguments)


def _fake_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    wanted = bias is not None and arguments[-2]
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if wanted else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? cos, Tensor? sin, bool interleaved,"
    " int k_offset, float scale, bool is_causal"
)
_forward_op = registration.define(
    f"temporal_attention({_ARGUMENTS}, str impl) -> Tensor", kernel=_forward, fake=_fake_forward
)
_backward_op = registration.define(
    f"temporal_attention_backward(Tensor grad, {_ARGUMENTS}, bool bias_grad, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    *ctx.options, ctx.impl = inputs[7:]


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    bias_grad = ctx.needs_input_grad[3]
    arguments = (grad, *ctx.saved_tensors, *ctx.options, bias_grad, ctx.impl)
    dq, dk, dv, dbias = registration.call(_backward_op, torch.is_grad_enabled(), *arguments)
    return dq, dk, dv, dbias if bias_grad else None, *[None] * 8


registration.differentiable(
    _forward_op, setup_context=_setup_context, backward=_differentiate, backward_op=_backward_op
)
dispatch.register(
    _OP,
    dispatch.Impl("cpu", registration.on_cpu, partial(_call_kernel, "cpu"), frozenset({"x86_64"}), _slower),
    dispatch.Impl(
        "triton", _triton_supports, partial(_call_kernel, "triton"), frozenset(), slower=registration.interpreted
    ),
    dispatch.Impl("reference", lambda facts: None, _reference),
)
