"""The temporal attention block: norm, projections, attention over the frames, output projection, residual."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .precision import accumulation_dtype
from .temporal_attention import temporal_attention


def temporal_attention_block(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    out_weight: torch.Tensor,
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
    attend: Callable[..., torch.Tensor] = temporal_attention,
) -> torch.Tensor:
    """x + out(temporal_attention(q, k, v)), with q, k, v projected from norm(x) + frame_embedding.

    x (B, C, T, H, W); q_weight, k_weight, v_weight (heads*D, C); out_weight (C, heads*D); frame_embedding (T, C). The
    norm is computed in the accumulation dtype; projections run in x's dtype. The result has the strides of
    `torch.empty_like(x)`. `attend` computes what `temporal_attention` does.
    """
    rows = x.movedim(1, -1).flatten(2, 3)
    rows = _normalised(rows, norm, norm_weight, norm_bias, eps, frame_embedding)
    q, k, v = (
        _linear(rows, weight, bias).unflatten(-1, (heads, -1))
        for weight, bias in ((q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias))
    )
    y = attend(q, k, v, attn_bias, attn_mask, rotary, rotary_style, 0, scale, is_causal)
    y = _linear(y.flatten(3), out_weight, out_bias).unflatten(2, x.shape[3:]).movedim(-1, 1)
    if residual:
        y = x + y
    like = torch.empty_like(x)
    return y if y.stride() == like.stride() else like.copy_(y)


def _normalised(
    rows: torch.Tensor,
    norm: str | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    frame_embedding: torch.Tensor | None,
) -> torch.Tensor:
    """norm(rows) + frame_embedding of (B, T, S, C) rows, rounded to their dtype once."""
    wide, channels = accumulation_dtype(rows.dtype), rows.shape[-1:]
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    y = rows
    if norm == "layer_norm":
        y = F.layer_norm(y.to(wide), channels, weight, bias, eps)
    elif norm == "rms_norm":
        y = F.rms_norm(y.to(wide), channels, weight, eps)
    if frame_embedding is not None:
        y = y.to(wide) + frame_embedding.to(wide)[:, None]
    return y.to(rows.dtype)


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear in the dtype of the rows, whatever the parameters'."""
    return F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
