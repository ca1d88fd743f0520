"""What a user writes without fastvdiff: the baselines, in plain torch and einops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange


def group_norm_silu(x: Any, groups: int, weight: Any, bias: Any, scale: Any = None, shift: Any = None) -> torch.Tensor:
    """GroupNorm, modulation and SiLU as three or more passes."""
    y = F.group_norm(x, groups, weight, bias)
    if scale is not None:
        y = y * (1 + scale[:, :, None, None, None]) + shift[:, :, None, None, None]
    return F.silu(y)


def temporal_attention(q: Any, k: Any, v: Any, attn_bias: Any = None, *, heads: int) -> torch.Tensor:
    """Frames to the sequence axis, SDPA, and back: q, k and v are (B, heads*D, T, H, W)."""
    batch, height = q.shape[0], q.shape[-2]
    q, k, v = (rearrange(t, "b (n d) t h w -> (b h w) n t d", n=heads) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias)
    return rearrange(y, "(b h w) n t d -> b (n d) t h w", b=batch, h=height)


def temporal_attention_block(
    x: Any, q_weight: Any, k_weight: Any, v_weight: Any, out_weight: Any, out_bias: Any, norm_weight: Any,
    norm_bias: Any, heads: int,
) -> torch.Tensor:  # fmt: skip
    """Pre-norm, projections, attention over frames, output projection and residual."""
    height = x.shape[-2]
    rows = F.layer_norm(rearrange(x, "b c t h w -> (b h w) t c"), x.shape[1:2], norm_weight, norm_bias)
    q, k, v = (
        rearrange(F.linear(rows, weight), "s t (n d) -> s n t d", n=heads) for weight in (q_weight, k_weight, v_weight)
    )
    y = rearrange(F.scaled_dot_product_attention(q, k, v), "s n t d -> s t (n d)")
    return x + rearrange(F.linear(y, out_weight, out_bias), "(b h w) t c -> b c t h w", h=height, b=x.shape[0])


def conv3d(x: Any, weight: Any, bias: Any) -> torch.Tensor:
    """The convolution as torch runs it when it is asked plainly, with "same" zero padding."""
    return F.conv3d(x, weight, bias, padding=tuple(k // 2 for k in weight.shape[2:]))


def norm_silu_conv3d(x: Any, groups: int, norm_weight: Any, norm_bias: Any, weight: Any, bias: Any) -> torch.Tensor:
    """The norm, the activation and the convolution of a ResNet block, one after the other."""
    return conv3d(group_norm_silu(x, groups, norm_weight, norm_bias), weight, bias)


def resnet_tail(x: Any, weight: Any, bias: Any, channel_bias: Any, residual: Any) -> torch.Tensor:
    """A convolution with the time embedding and the shortcut of a ResNet block added."""
    return conv3d(x, weight, bias) + channel_bias[:, :, None, None, None] + residual


def ddim_step(
    sample: Any, conditional: Any, unconditional: Any, alpha_t: float, alpha_prev: float, guidance: float, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guidance, x0, clip and the deterministic update for an epsilon model."""
    epsilon = unconditional + guidance * (conditional - unconditional)
    x0 = (sample - (1 - alpha_t) ** 0.5 * epsilon) / alpha_t**0.5
    clipped = x0.clamp(-clip, clip)
    return alpha_prev**0.5 * clipped + (1 - alpha_prev) ** 0.5 * epsilon, clipped
