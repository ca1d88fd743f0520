"""temporal_attention's CPU kernels (csrc/cpu/temporal_attention.cpp)."""

from __future__ import annotations

from typing import Any

import torch

from . import DTYPE_CODES, address, library, threads, wide

_Optional = torch.Tensor | None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: _Optional, mask: _Optional, cos: _Optional,
    sin: _Optional, interleaved: bool, k_offset: int, scale: float, is_causal: bool,
) -> torch.Tensor:  # fmt: skip
    """The result, with the strides of `torch.empty_like(q)`; 0 where there are no keys."""
    y = torch.empty_like(q)
    if not y.numel():
        return y
    if not k.numel():
        return y.zero_()
    params, _held = _params(q, k, v, bias, mask, cos, sin, interleaved, k_offset, scale, is_causal)
    params.set_result(address(y), y.stride())
    lib = library()
    workspace = torch.empty(lib.temporal_attention_workspace(params), dtype=torch.float32, device="cpu")
    lib.temporal_attention_forward(params, address(workspace))
    return y


def backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: _Optional, mask: _Optional,
    cos: _Optional, sin: _Optional, interleaved: bool, k_offset: int, scale: float, is_causal: bool, bias_grad: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v and the bias (an empty tensor unless `bias_grad`), each in its own dtype."""
    grads = [torch.empty_like(x) for x in (q, k, v)]
    wide_grad = torch.empty(bias.shape, dtype=torch.float32, device="cpu") if bias is not None and bias_grad else None
    if q.numel() and k.numel():
        params, _held = _params(q, k, v, bias, mask, cos, sin, interleaved, k_offset, scale, is_causal)
        views = (grad, *grads)
        params.set_gradients([address(x) for x in views], [x.stride() for x in views], address(wide_grad))
        lib = library()
        workspace = torch.empty(lib.temporal_attention_workspace(params), dtype=torch.float32, device="cpu")
        lib.temporal_attention_backward(params, address(workspace))
    else:
        for x in (*grads, *(() if wide_grad is None else (wide_grad,))):
            x.zero_()
    return *grads, q.new_empty(0) if wide_grad is None else wide_grad.to(bias.dtype)


def _params(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: _Optional, mask: _Optional, cos: _Optional,
    sin: _Optional, interleaved: bool, k_offset: int, scale: float, is_causal: bool,
) -> tuple[Any, tuple[_Optional, ...]]:  # fmt: skip
    """The kernel's parameters, and the tables that must outlive the call."""
    batch, frames, positions, heads, dim = q.shape
    keys = k.shape[1]
    rows = mask.reshape(batch, -1, keys).contiguous() if mask is not None else None
    tables = (wide(bias), rows, wide(cos), wide(sin))
    pairs = cos.shape[1] if cos is not None else 0
    sizes = (batch, frames, keys, positions, heads, dim, rows.shape[1] if rows is not None else 1, pairs, k_offset)
    params = library().TemporalAttentionParams(
        sizes, (interleaved, is_causal), scale, DTYPE_CODES[q.dtype], threads(), [address(t) for t in tables],
        [address(x) for x in (q, k, v)], [x.stride() for x in (q, k, v)],
    )  # fmt: skip
    return params, tables
