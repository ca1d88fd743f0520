"""diffusers' ResnetBlock2D: both norms with what follows them, and the sums in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvdiff.swap.chains import convolved, normalised
from fastvdiff.swap.target import Target, drops_nothing, plain, register, silu

from .sequences import fuses, norm_silu


def _check(block: nn.Module) -> str | None:
    parts = ("norm1", "conv1", "norm2", "conv2", "dropout", "nonlinearity", "time_emb_proj", "conv_shortcut",
             "upsample", "downsample", "output_scale_factor", "time_embedding_norm", "skip_time_act")  # fmt: skip
    for name in parts:
        if not hasattr(block, name):
            return f"a ResnetBlock2D without {name}"
    if block.time_embedding_norm not in ("default", "scale_shift"):
        return f"time_embedding_norm {block.time_embedding_norm!r}"
    if not silu(block.nonlinearity):
        return f"its nonlinearity is {type(block.nonlinearity).__name__}, not SiLU"
    for name in ("norm1", "norm2"):
        if not isinstance(getattr(block, name), nn.GroupNorm):
            return f"{name} is {type(getattr(block, name)).__name__}, not GroupNorm"
    return None


def _forward(
    block: nn.Module, eager: Any, input_tensor: torch.Tensor, temb: torch.Tensor | None = None, *args: Any,
    **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    projected = block.time_emb_proj is not None and temb is not None
    understood = not (args or kwargs) and silu(block.nonlinearity) and projected == (temb is not None)
    if block.time_embedding_norm == "scale_shift":
        understood = understood and projected
    if not (understood and plain(block.norm2, nn.GroupNorm) and fuses(input_tensor, block.norm1)):
        return eager(block, input_tensor, temb, *args, **kwargs)
    x, h = input_tensor, norm_silu(input_tensor, block.norm1)
    resample = block.upsample if block.upsample is not None else block.downsample
    if resample is not None:
        if block.upsample is not None and h.shape[0] >= 64:
            # As eager does: nearest upsampling in channels_last fails on large batches (diffusers issue 984).
            x, h = x.contiguous(), h.contiguous()
        x, h = resample(x), resample(h)
    added = scale = shift = None
    if projected:
        temb = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
        if block.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
        else:
            added = temb
    h, stats = convolved(block.conv1, h, block.norm2, added)
    if block.conv_shortcut is not None:
        # As eager does: DistributedDataParallel wants the gradient of a contiguous weight to be contiguous.
        x = block.conv_shortcut(x.contiguous() if block.training else x)
    idle = drops_nothing(block.dropout)
    fused = normalised(block.norm2, block.conv2, h, stats, scale, shift, x) if idle else None
    if fused is not None:
        y = fused[0]
    else:
        h = block.dropout(norm_silu(h, block.norm2, scale=scale, shift=shift, stats=stats))
        y, _ = convolved(block.conv2, h, None, residual=x)
    return y if block.output_scale_factor == 1 else y / block.output_scale_factor


register(Target(("ResnetBlock2D",), "GroupNorm, modulation and SiLU in one pass, twice", _check, _forward))
