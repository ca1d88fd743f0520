"""Example calls of every op: what `fastvdiff doctor` looks at and `fastvdiff verify` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastvdiff.reference.conv3d import moments

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """One op call: `make(draw, big)` gives its arguments, small ones for accuracy or big ones for a race.

    `training` tells whether every implementation has its gradient.
    """

    op: str
    label: str
    make: Callable[[Draw, bool], Arguments]
    training: bool = True


class Draw:
    """Normal tensors of one dtype on one device, from one seed; floating ones take part in gradients."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.side = 4 if device == "cuda" else 1  # of a race's frames: what a GPU needs to show more than its launches
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float = 1.0, channels_last: bool = False) -> torch.Tensor:
        """A leaf of this shape, channels_last_3d if asked."""
        t = (torch.randn(shape, generator=self._generator) * std).to(self.dtype)
        if channels_last:
            t = t.contiguous(memory_format=torch.channels_last_3d)
        return t.to(self.device).requires_grad_(True)


def _group_norm_silu(draw: Draw, big: bool) -> Arguments:
    b, c, t, s = (1, 64, 16, 32 * draw.side) if big else (2, 40, 3, 5)
    return (draw(b, c, t, s, s, channels_last=True), 8, draw(c), draw(c)), {}


def _group_norm_silu_modulated(draw: Draw, big: bool) -> Arguments:
    (x, groups, weight, bias), _ = _group_norm_silu(draw, big)
    b, c = x.shape[:2]
    return (x, groups, weight, bias), {"scale": draw(b, c), "shift": draw(b, c)}


def _temporal_attention(draw: Draw, big: bool) -> Arguments:
    b, t, s, heads, d = (1, 16, 1024 * draw.side**2, 4, 32) if big else (1, 7, 9, 2, 40)
    return tuple(draw(b, t, s, heads, d) for _ in range(3)), {}


def _temporal_attention_biased(draw: Draw, big: bool) -> Arguments:
    qkv, _ = _temporal_attention(draw, big)
    t, heads = qkv[0].shape[1], qkv[0].shape[3]
    return qkv, {"attn_bias": draw(heads, t, t)}


def _temporal_attention_channels_first(draw: Draw, big: bool) -> Arguments:
    """Views of a contiguous video, with every option."""
    b, t, s, heads, d = (1, 25, 1024 * draw.side**2, 4, 64) if big else (2, 5, 33, 2, 24)
    qkv = [draw(b, heads, d, t, s).permute(0, 3, 4, 1, 2) for _ in range(3)]
    angles = torch.arange(t, device=draw.device)[:, None] * 0.5 ** torch.arange(d // 4, device=draw.device)
    mask = torch.ones(b, t, dtype=torch.bool, device=draw.device)
    mask[:, t // 2] = False
    return tuple(qkv), {"rotary": (angles.cos(), angles.sin()), "attn_mask": mask, "is_causal": True}


def _temporal_attention_long(draw: Draw, big: bool) -> Arguments:
    b, t, s, heads, d = (1, 128, 256 * draw.side**2, 4, 64) if big else (1, 100, 2, 2, 40)
    return tuple(draw(b, t, s, heads, d) for _ in range(3)), {}


def _temporal_attention_block(draw: Draw, big: bool) -> Arguments:
    c, inner, heads, t, s = (64, 128, 4, 16, 32 * draw.side) if big else (24, 16, 2, 5, 3)
    x = draw(1, c, t, s, s, channels_last=True)
    q, k, v = (draw(inner, c, std=c**-0.5) for _ in range(3))
    named = {"out_bias": draw(c), "norm_weight": draw(c), "norm_bias": draw(c)}
    return (x, q, k, v, draw(c, inner, std=inner**-0.5)), {"heads": heads, **named}


def _conv3d(draw: Draw, big: bool) -> Arguments:
    b, c, t, s = (1, 64, 16, 16 * draw.side) if big else (1, 24, 3, 8)
    x = draw(b, c, t, s, s, channels_last=True)
    return (x, draw(c, c, 1, 3, 3, std=(9 * c) ** -0.5), draw(c)), {"padding": "same", "channel_bias": draw(b, c)}


def _conv3d_causal(draw: Draw, big: bool) -> Arguments:
    """Earlier frames in front, repeated edges beside, every sum, and the statistics of the result."""
    b, c, t, s = (1, 64, 8, 16 * draw.side) if big else (2, 24, 3, 5)
    x = draw(b, c, t, s, s, channels_last=True)
    named = {
        "padding": (2, 0, 1, 1, 1, 1), "padding_mode": ("zeros", "replicate", "replicate"), "stats_groups": 4,
        "prefix": draw(b, c, 2, s, s), "channel_bias": draw(b, c, t), "residual": draw(b, c, t, s, s),
    }  # fmt: skip
    return (x, draw(c, c, 3, 3, 3, std=(27 * c) ** -0.5), draw(c)), named


def _conv3d_down(draw: Draw, big: bool) -> Arguments:
    """Contiguous, 3 channels, each step of its own."""
    b, k, t, s = (1, 64, 16, 64 * draw.side) if big else (2, 20, 5, 9)
    return (draw(b, 3, t, s, s), draw(k, 3, 3, 3, 3, std=81**-0.5), draw(k)), {
        "padding": (1, 1, 0, 1, 2, 1), "stride": (1, 2, 2), "dilation": (2, 1, 1),
    }  # fmt: skip


def _norm_silu_conv3d(draw: Draw, big: bool) -> Arguments:
    (x, weight, bias), named = _conv3d(draw, big)
    c = x.shape[1]
    return (x, 8, draw(c), draw(c), weight, bias), named


def _norm_silu_conv3d_given(draw: Draw, big: bool) -> Arguments:
    """The second half of a residual block: statistics come from the first, the modulation from the time."""
    (x, groups, *rest), named = _norm_silu_conv3d(draw, big)
    b, c = x.shape[:2]
    more = {"scale": draw(b, c), "shift": draw(b, c), "residual": draw(*x.shape, channels_last=True)}
    return (x, groups, *rest), {**named, **more, "stats": moments(x.detach().float(), groups)}


def _group_norm_silu_contiguous(draw: Draw, big: bool) -> Arguments:
    (x, *rest), _ = _group_norm_silu(draw, big)
    return (x.contiguous(), *rest), {}


def _ddim_step_noisy(draw: Draw, big: bool) -> Arguments:
    shape = (2, 4, 16, 128 * draw.side, 128 * draw.side) if big else (2, 4, 3, 5, 7)
    seed = torch.tensor([1234], device=draw.device)
    return (draw(*shape), draw(*shape), 0.5, 0.6), {"eta": 1.0, "noise_seed": seed, "prediction_type": "v_prediction"}


def _ddim_step_threshold(draw: Draw, big: bool) -> Arguments:
    args, named = _ddim_step(draw, big)
    return args, {**named, "clip_sample": None, "dynamic_threshold": (0.95, 4.0), "guidance_rescale": 0.7}


def _ddim_step(draw: Draw, big: bool) -> Arguments:
    shape = (2, 4, 16, 128 * draw.side, 128 * draw.side) if big else (2, 4, 3, 5, 7)
    named = {"uncond_output": draw(*shape), "guidance_scale": 7.5, "clip_sample": 1.0}
    return (draw(*shape), draw(*shape), 0.5, 0.6), named


def _geglu(draw: Draw, big: bool) -> Arguments:
    rows, width = (2048 * draw.side**2, 640) if big else (35, 40)
    return (draw(2, rows, 2 * width),), {}


EXAMPLES = (
    Example("group_norm_silu", "GroupNorm + SiLU", _group_norm_silu),
    Example("group_norm_silu", "the same, contiguous", _group_norm_silu_contiguous),
    Example("group_norm_silu", "GroupNorm + scale, shift + SiLU", _group_norm_silu_modulated),
    Example("temporal_attention", "attention over 16 frames", _temporal_attention),
    Example("temporal_attention", "with an additive bias", _temporal_attention_biased),
    Example("temporal_attention", "channels first, rotary, mask, causal", _temporal_attention_channels_first),
    Example("temporal_attention", "over 128 frames", _temporal_attention_long),
    Example("temporal_attention_block", "norm, projections, attention, residual", _temporal_attention_block),
    Example("conv3d", "1x3x3 with a bias per sample", _conv3d),
    Example("conv3d", "3x3x3, causal, with sums and statistics", _conv3d_causal),
    Example("conv3d", "3x3x3 on 3 channels, strides and dilation", _conv3d_down),
    Example("norm_silu_conv3d", "GroupNorm + SiLU + 1x3x3", _norm_silu_conv3d),
    Example("norm_silu_conv3d", "the same, modulated, statistics given", _norm_silu_conv3d_given),
    Example("geglu", "h * gelu(gate) of a feed-forward layer", _geglu),
    Example("ddim_step", "DDIM step, guidance and clip", _ddim_step),
    Example("ddim_step", "DDIM step, noise drawn inside", _ddim_step_noisy),
    Example("ddim_step", "DDIM step, threshold and rescale", _ddim_step_threshold, training=False),
)
