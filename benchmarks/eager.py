"""What a user writes without fastvdiff: the baselines, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def group_norm_silu(x: Any, groups: int, weight: Any, bias: Any, scale: Any = None, shift: Any = None) -> torch.Tensor:
    """GroupNorm, modulation and SiLU as three or more passes."""
    y = F.group_norm(x, groups, weight, bias)
    if scale is not None:
        y = y * (1 + scale[:, :, None, None, None]) + shift[:, :, None, None, None]
    return F.silu(y)


def temporal_attention(
    q: Any, k: Any, v: Any, attn_bias: Any = None, cos: Any = None, sin: Any = None, *, heads: int
) -> torch.Tensor:
    """Frames to the sequence axis, SDPA, and back: q, k and v are (B, heads*D, T, H, W)."""
    batch, height, width = q.shape[0], *q.shape[-2:]
    q, k, v = frames_last(q, k, v, cos, sin, heads=heads)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias)
    return y.unflatten(0, (batch, height, width)).permute(0, 3, 5, 4, 1, 2).flatten(1, 2)


def frames_last(q: Any, k: Any, v: Any, cos: Any = None, sin: Any = None, *, heads: int) -> tuple[torch.Tensor, ...]:
    """q, k and v as SDPA takes them, (B*H*W, heads, T, D): a copy of each; q and k turned by rotary (cos, sin)."""
    q, k, v = (t.unflatten(1, (heads, -1)).permute(0, 4, 5, 1, 3, 2).flatten(0, 2) for t in (q, k, v))
    return (q, k, v) if cos is None else (rotate(q, cos, sin), rotate(k, cos, sin), v)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on interleaved pairs: x (..., T, D), cos and sin (T, D/2) in float32, the result as x."""
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def temporal_attention_block(
    x: Any, q_weight: Any, k_weight: Any, v_weight: Any, out_weight: Any, out_bias: Any, norm_weight: Any,
    norm_bias: Any, heads: int,
) -> torch.Tensor:  # fmt: skip
    """Pre-norm, projections, attention over frames, output projection and residual."""
    batch, (height, width) = x.shape[0], x.shape[-2:]
    rows = F.layer_norm(x.permute(0, 3, 4, 2, 1).flatten(0, 2), x.shape[1:2], norm_weight, norm_bias)
    q, k, v = (
        F.linear(rows, weight).unflatten(-1, (heads, -1)).transpose(1, 2) for weight in (q_weight, k_weight, v_weight)
    )
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return x + F.linear(y, out_weight, out_bias).unflatten(0, (batch, height, width)).permute(0, 4, 3, 1, 2)


def conv3d(x: Any, weight: Any, bias: Any, stride: tuple[int, ...] = (1, 1, 1)) -> torch.Tensor:
    """The convolution as torch runs it when it is asked plainly, zeros around it by half of an odd kernel."""
    return F.conv3d(x, weight, bias, stride, padding=tuple(k // 2 for k in weight.shape[2:]))


def moments(y: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, G, 2): mean and centred sum of squares of each group of channels, in float32."""
    grouped = y.detach().unflatten(1, (groups, -1)).flatten(2).float()
    variance, mean = torch.var_mean(grouped, 2, correction=0)
    return torch.stack((mean, variance * grouped.shape[2]), dim=-1)


def conv3d_moments(x: Any, weight: Any, bias: Any, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The convolution, and its result's moments by one more pass over it."""
    y = conv3d(x, weight, bias)
    return y, moments(y, groups)


def conv3d_norm_silu(x: Any, weight: Any, bias: Any, groups: int, norm_weight: Any, norm_bias: Any) -> torch.Tensor:
    """A convolution, and the norm and the activation that follow it."""
    return group_norm_silu(conv3d(x, weight, bias), groups, norm_weight, norm_bias)


def norm_silu_conv3d(x: Any, groups: int, norm_weight: Any, norm_bias: Any, weight: Any, bias: Any) -> torch.Tensor:
    """The norm, the activation and the convolution of a ResNet block, one after the other."""
    return conv3d(group_norm_silu(x, groups, norm_weight, norm_bias), weight, bias)


def resnet_tail(x: Any, weight: Any, bias: Any, channel_bias: Any, residual: Any) -> torch.Tensor:
    """A convolution with the time embedding and the shortcut of a ResNet block added."""
    return conv3d(x, weight, bias) + channel_bias[:, :, None, None, None] + residual


def resnet_block(
    x: Any, groups: int, first: tuple[Any, Any, Any, Any], channel_bias: Any, last: tuple[Any, Any, Any, Any]
) -> torch.Tensor:
    """Norm, SiLU and convolution twice, the time embedding between them, the shortcut at the end.

    `first` and `last`: the norm's weight and bias, the convolution's weight and bias.
    """
    h = norm_silu_conv3d(x, groups, *first) + channel_bias[:, :, None, None, None]
    return x + norm_silu_conv3d(h, groups, *last)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """diffusers' own: the second half of each row gates the first."""
    h, gate = x.chunk(2, dim=-1)
    return h * F.gelu(gate)


def ddim_step(
    sample: Any, conditional: Any, unconditional: Any, alpha_t: float, alpha_prev: float, guidance: float, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guidance, x0, clip and the deterministic update for an epsilon model."""
    x0, epsilon = _original(sample, conditional, unconditional, alpha_t, guidance)
    clipped = x0.clamp(-clip, clip)
    return alpha_prev**0.5 * clipped + (1 - alpha_prev) ** 0.5 * epsilon, clipped


def ddim_step_noise(
    sample: Any, conditional: Any, unconditional: Any, alpha_t: float, alpha_prev: float, guidance: float, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step with eta = 1: as much noise as the ancestral sampler adds, drawn by torch."""
    x0, epsilon = _original(sample, conditional, unconditional, alpha_t, guidance)
    clipped = x0.clamp(-clip, clip)
    variance = (1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev)
    mean = alpha_prev**0.5 * clipped + (1 - alpha_prev - variance) ** 0.5 * epsilon
    return mean + variance**0.5 * torch.randn_like(sample), clipped


def ddim_step_threshold(
    sample: Any, conditional: Any, unconditional: Any, alpha_t: float, alpha_prev: float, guidance: float,
    ratio: float, most: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The step with dynamic thresholding: x0 clamped to a quantile of each sample, and divided by it."""
    x0, epsilon = _original(sample, conditional, unconditional, alpha_t, guidance)
    magnitudes = x0.flatten(1).abs()
    magnitudes = magnitudes if magnitudes.dtype == torch.float64 else magnitudes.float()  # quantile takes no bfloat16
    bound = torch.quantile(magnitudes, ratio, dim=1).clamp(1, most).to(x0.dtype)[:, None, None, None, None]
    x0 = x0.clamp(-bound, bound) / bound
    return alpha_prev**0.5 * x0 + (1 - alpha_prev) ** 0.5 * epsilon, x0


def _original(
    sample: Any, conditional: Any, unconditional: Any, alpha_t: float, guidance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and epsilon of an epsilon model under guidance."""
    epsilon = unconditional + guidance * (conditional - unconditional)
    return (sample - (1 - alpha_t) ** 0.5 * epsilon) / alpha_t**0.5, epsilon
