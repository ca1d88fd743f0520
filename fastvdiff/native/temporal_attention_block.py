"""temporal_attention_block's CPU kernels (csrc/cpu/temporal_attention_block*.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import DTYPE_CODES, address, library, threads, wide

_NORM_CODES = {None: 0, "layer_norm": 1, "rms_norm": 2}

# q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, out_weight, out_bias, norm_weight, norm_bias, frame_embedding,
# attn_bias: the order that csrc/bindings.cpp reads them in.
Parameters = Sequence[torch.Tensor | None]


def forward(
    x: torch.Tensor, parameters: Parameters, heads: int, norm: str | None, eps: float, mask: torch.Tensor | None,
    cos: torch.Tensor | None, sin: torch.Tensor | None, rotary_style: str, scale: float, is_causal: bool,
    residual: bool,
) -> torch.Tensor:  # fmt: skip
    """The block's result, with the strides of `torch.empty_like(x)`."""
    y = torch.empty_like(x)
    if not x.numel():
        return y
    call = _Call(x, parameters, heads, norm, eps, mask, cos, sin, rotary_style, scale, is_causal, residual)
    lib, y_rows = library(), _rows(y)
    workspace = torch.empty(
        lib.temporal_attention_block_forward_workspace(call.params), dtype=torch.float32, device="cpu"
    )
    lib.temporal_attention_block_forward(call.params, address(workspace), address(y_rows), y_rows.stride())
    return _written_back(y, y_rows)


def backward(
    grad: torch.Tensor, x: torch.Tensor, parameters: Parameters, wanted: Sequence[bool], heads: int, norm: str | None,
    eps: float, mask: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None, rotary_style: str,
    scale: float, is_causal: bool, residual: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of x and of each parameter; an empty tensor where the parameter is None or its gradient unwanted."""
    dx = torch.empty_like(x)
    wanted = [want and p is not None for want, p in zip(wanted, parameters, strict=True)]
    if not x.numel():
        return [dx, *(torch.zeros_like(p, memory_format=torch.contiguous_format) if want else x.new_empty(0)
                      for want, p in zip(wanted, parameters, strict=True))]  # fmt: skip
    call = _Call(x, parameters, heads, norm, eps, mask, cos, sin, rotary_style, scale, is_causal, residual)
    grads = [
        torch.empty(p.shape, dtype=torch.float32, device="cpu") if want else None
        for want, p in zip(wanted, parameters, strict=True)
    ]
    addresses = [address(g) for g in grads]
    lib, grad_rows, dx_rows = library(), _rows(grad), _rows(dx)
    workspace = torch.empty(
        lib.temporal_attention_block_backward_workspace(call.params, addresses), dtype=torch.float32, device="cpu"
    )
    lib.temporal_attention_block_backward(
        call.params, address(workspace), addresses, address(grad_rows), grad_rows.stride(), address(dx_rows),
        dx_rows.stride(),
    )  # fmt: skip
    return [
        _written_back(dx, dx_rows),
        *(x.new_empty(0) if g is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True)),
    ]


class _Call:
    """The kernel's arguments, with the tensors they point to kept alive."""

    def __init__(
        self, x: torch.Tensor, parameters: Parameters, heads: int, norm: str | None, eps: float,
        mask: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None, rotary_style: str, scale: float,
        is_causal: bool, residual: bool,
    ) -> None:  # fmt: skip
        rows = _rows(x)
        batch, frames, positions, channels = rows.shape
        dim = parameters[0].shape[0] // heads
        mask_rows = 1 if mask is None or mask.dim() == 2 else frames
        pairs = 0 if cos is None else cos.shape[1]
        tables = [None if mask is None else mask.contiguous(), wide(cos), wide(sin)]
        self._alive: list[Any] = [rows, *(wide(p) for p in parameters), *tables]
        self.params = library().TemporalAttentionBlockParams(
            (batch, channels, frames, positions, heads, dim, mask_rows, pairs),
            (rotary_style == "interleaved", is_causal, residual), eps, scale, _NORM_CODES[norm], DTYPE_CODES[x.dtype],
            threads(), [address(t) for t in self._alive[1:]], address(rows), rows.stride(),
        )  # fmt: skip


def _rows(t: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) as (B, T, S, C): a view where H and W have a common stride."""
    return t.movedim(1, -1).flatten(2, 3)


def _written_back(t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """t holding what was written to `rows`, which is a copy where t's strides allowed no view."""
    if rows.data_ptr() != t.data_ptr():
        t.copy_(rows.unflatten(2, t.shape[3:]).movedim(-1, 1))
    return t
