"""Attention inside a block that has the frames apart: over frames, and over a text that they share.

diffusers' Attention, the CrossAttention of the latent diffusion family, and AnimateDiff's VersatileAttention: four
linear layers by the same names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastvdiff import ops

from .frames import onto
from .target import drops_nothing, in_own_dtype, kernel_runs, kernel_would_run, plain, untouched

_PROCESSORS = ("AttnProcessor2_0", "AttnProcessor")
_ABSENT = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim", "out_context_pre_only")


def unknown(attn: Any) -> str | None:
    """Why an Attention is not softmax(q k^T / sqrt(D)) v between four linear layers, or None if it is that."""
    if type(attn.processor).__name__ not in _PROCESSORS:
        return f"its processor is {type(attn.processor).__name__}"
    for name in _ABSENT:
        if getattr(attn, name, None) is not None:
            return f"it has {name}"
    if attn.residual_connection or attn.rescale_output_factor != 1:
        return "it adds a residual or rescales its output"
    if attn.upcast_attention or attn.upcast_softmax or not attn.scale_qk:
        return "it casts or scales its scores in a way of its own"
    if getattr(attn, "inner_kv_dim", attn.inner_dim) != attn.inner_dim:
        return "it has fewer key heads than query heads"
    return None


def ready(attn: nn.Module) -> bool:
    """Whether, at this call, the attention is what `unknown` knows and may be computed without calling it."""
    return unknown(attn) is None and untouched(attn) and drops_nothing(attn.to_out[1])


def unknown_latent(attn: Any) -> str | None:
    """`unknown` for a CrossAttention, or MemoryEfficientCrossAttention, of the latent diffusion family."""
    if type(attn).__name__ not in ("CrossAttention", "MemoryEfficientCrossAttention"):
        return f"its attention is {type(attn).__name__}"
    if getattr(attn, "relative_position", False):
        return "learned relative positions enter its scores and its values: no kernel for it"
    if getattr(attn, "img_cross_attention", False) or getattr(attn, "image_cross_attention", False):
        return "it attends to an image beside the text"
    kinds = [type(layer).__name__ for layer in attn.to_out] if isinstance(attn.to_out, nn.Sequential) else []
    return None if len(kinds) == 2 and kinds[1] == "Dropout" else f"its to_out is {kinds}"


def ready_latent(attn: nn.Module) -> bool:
    """`ready` for what `unknown_latent` knows; the forward through xformers that it gives itself is one of its own."""
    own = attn.__dict__.get("forward")
    if own is not None:
        known = getattr(own, "__func__", None) is getattr(type(attn), "efficient_forward", None)
        own_hooks = attn._forward_hooks or attn._forward_pre_hooks
        return known and not own_hooks and untouched(attn.to_out) and drops_nothing(attn.to_out[1])
    return untouched(attn) and untouched(attn.to_out) and drops_nothing(attn.to_out[1])


def runs_over_frames(attn: nn.Module, like: torch.Tensor, sizes: tuple[int, int, int]) -> bool:
    """Whether a kernel runs attention over the frames of tokens of `sizes` (B, T, S), on the device of `like`."""
    inner = getattr(attn, "inner_dim", None) or attn.to_q.out_features
    shape = (*sizes, attn.heads, inner // attn.heads)
    return kernel_would_run("temporal_attention", like, shape, torch.is_grad_enabled(), keys=sizes[1])


def over_frames(
    attn: nn.Module, norm: nn.Module, x: torch.Tensor, frame_embedding: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x + attn(norm(x) + frame_embedding) over the frames of tokens x (B, T, S, C).

    frame_embedding (T, C) or None; attn_mask (B, T, T) bool, True where a frame may attend, or None.
    """
    linear = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
    if plain(norm, nn.LayerNorm) and all(plain(layer, nn.Linear) for layer in linear):
        video = x.permute(0, 3, 1, 2).unsqueeze(-1)
        weights = [layer.weight for layer in linear]
        if in_own_dtype(x) and kernel_runs(
            "temporal_attention_block", video, *weights, heads=attn.heads, inner=weights[0].shape[0]
        ):
            y = ops.temporal_attention_block(
                video, *weights, heads=attn.heads, q_bias=attn.to_q.bias, k_bias=attn.to_k.bias, v_bias=attn.to_v.bias,
                out_bias=attn.to_out[0].bias, norm="layer_norm", norm_weight=norm.weight, norm_bias=norm.bias,
                eps=norm.eps, frame_embedding=frame_embedding, attn_mask=attn_mask,
            )  # fmt: skip
            return y.squeeze(-1).permute(0, 2, 3, 1)
    h = norm(x)
    if frame_embedding is not None:
        h = onto(h, frame_embedding[:, None], plain(norm, nn.LayerNorm))
    q, k, v = (layer(h).unflatten(-1, (attn.heads, -1)) for layer in linear[:3])
    y = attn.to_out[0](ops.temporal_attention(q, k, v, attn_mask=attn_mask).flatten(-2))
    return onto(y, x, plain(attn.to_out[0], nn.Linear))


def over_text(attn: nn.Module, h: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """attn of tokens h (B, N, C) to text (B, L, C_text): keys and values once for all that share a text."""
    one = text.shape[1] == 1
    if one and not torch.is_grad_enabled():
        # One key has all the weight, whatever the query.
        return attn.to_out[0](attn.to_v(text)).expand(-1, h.shape[1], -1)
    q, k, v = (
        layer(t).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for layer, t in ((attn.to_q, h), (attn.to_k, text), (attn.to_v, text))
    )
    # A softmax of one score is 1, whatever it is, and has a gradient of zero: a fused backward leaves rounding errors.
    y = (q * 0 @ k.transpose(-1, -2)).softmax(-1) @ v if one else F.scaled_dot_product_attention(q, k, v)
    return attn.to_out[0](y.transpose(1, 2).flatten(2))
