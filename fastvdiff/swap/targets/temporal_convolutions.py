"""Convolutions over frames, of diffusers, ModelScope and VideoCrafter; the mixture of space and time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvdiff.swap.chains import convolved, normalised
from fastvdiff.swap.frames import as_video, convolve, dense
from fastvdiff.swap.target import UNRELATED, Target, dropping, drops_nothing, plain, register, silu, takes, untouched

from .sequences import fuses, norm_silu

_STACK = ("conv1", "conv2", "conv3", "conv4")


def _check_layer(layer: nn.Module) -> str | None:
    for name in _STACK:
        stack = getattr(layer, name, None)
        kinds = [type(m) for m in stack] if isinstance(stack, nn.Sequential) else []
        if kinds not in ([nn.GroupNorm, nn.SiLU, nn.Conv3d], [nn.GroupNorm, nn.SiLU, nn.Dropout, nn.Conv3d]):
            return f"{name} is not GroupNorm, SiLU, Dropout or none, Conv3d"
    return None


def _layer(layer: nn.Module, eager: Any, hidden_states: torch.Tensor, num_frames: int = 1) -> torch.Tensor:
    stacks = [getattr(layer, name) for name in _STACK]
    h = as_video(hidden_states, num_frames)
    if not (fuses(h, stacks[0][0]) and all(_fusable(s) for s in stacks)):
        return eager(layer, hidden_states, num_frames)
    h = _through(stacks, dense(h, as_eager=dropping(layer)))
    # The sum in the input's layout is the way back to frames as well.
    return (hidden_states.unflatten(0, (-1, num_frames)) + h.transpose(1, 2)).flatten(0, 1)


def _check_latent(layer: nn.Module) -> str | None:
    if getattr(layer, "use_image_dataset", False):
        return "it is for images: its result is multiplied by zero"
    return _check_layer(layer)


def _latent(layer: nn.Module, eager: Any, x: torch.Tensor) -> torch.Tensor:
    stacks = [getattr(layer, name) for name in _STACK]
    if x.dim() != 5 or not (fuses(x, stacks[0][0]) and all(_fusable(s) for s in stacks)):
        return eager(layer, x)
    return x + _through(stacks, dense(x, as_eager=dropping(layer)))


def _through(stacks: list[nn.Sequential], h: torch.Tensor) -> torch.Tensor:
    """A video h through stacks of GroupNorm, SiLU, Dropout or none, Conv3d."""
    stats = None
    for stack, after in zip(stacks, (*stacks[1:], None), strict=True):
        norm, conv, then = stack[0], stack[-1], None if after is None else after[0]
        idle = len(stack) == 3 or drops_nothing(stack[2])
        fused = normalised(norm, conv, h, stats, then=then) if idle else None
        if fused is not None:
            h, stats = fused
            continue
        h = norm_silu(h, norm, stats=stats)
        if len(stack) == 4:
            h = stack[2](h)
        h, stats = convolved(conv, h, then)
    return h


def _fusable(stack: nn.Sequential) -> bool:
    return untouched(stack) and plain(stack[0], nn.GroupNorm) and silu(stack[1])


def _check_block(block: nn.Module) -> str | None:
    for name, kind in (("norm1", nn.GroupNorm), ("norm2", nn.GroupNorm), ("conv1", nn.Conv3d), ("conv2", nn.Conv3d)):
        if not isinstance(getattr(block, name, None), kind):
            return f"{name} is not a {kind.__name__}"
    if not silu(block.nonlinearity):
        return f"its nonlinearity is {type(block.nonlinearity).__name__}, not SiLU"
    return None


def _block(block: nn.Module, eager: Any, input_tensor: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
    understood = silu(block.nonlinearity) and plain(block.norm2, nn.GroupNorm)
    if not (understood and fuses(input_tensor, block.norm1)):
        return eager(block, input_tensor, temb)
    bias = None
    if block.time_emb_proj is not None:
        bias = block.time_emb_proj(block.nonlinearity(temb)).transpose(1, 2)
    h = norm_silu(dense(input_tensor, as_eager=dropping(block)), block.norm1)
    h, stats = convolved(block.conv1, h, block.norm2, bias)
    shortcut = input_tensor if block.conv_shortcut is None else convolve(block.conv_shortcut, input_tensor)
    idle = drops_nothing(block.dropout)
    fused = normalised(block.norm2, block.conv2, h, stats) if idle else None
    if fused is None:
        fused = convolved(block.conv2, block.dropout(norm_silu(h, block.norm2, stats=stats)), None)
    return shortcut + fused[0]


def _check_blender(blender: nn.Module) -> str | None:
    known = ("learned", "fixed", "learned_with_images")
    if getattr(blender, "merge_strategy", None) not in known or not hasattr(blender, "get_alpha"):
        return f"merge_strategy is none of {', '.join(known)}"
    return None if takes(blender, "image_only_indicator", "ndims", method="get_alpha") else UNRELATED


def _check_sgm_blender(blender: nn.Module) -> str | None:
    return None if takes(blender, "image_only_indicator", method="get_alpha") else UNRELATED


def _blend(
    blender: nn.Module, eager: Any, x_spatial: torch.Tensor, x_temporal: torch.Tensor,
    image_only_indicator: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    if x_spatial.dtype != x_temporal.dtype:
        return eager(blender, x_spatial, x_temporal, image_only_indicator)
    alpha = blender.get_alpha(image_only_indicator, x_spatial.ndim).to(x_spatial.dtype)
    first, last = (x_temporal, x_spatial)
    if getattr(blender, "switch_spatial_to_temporal_mix", False):
        first, last = last, first
    return torch.lerp(first, last, alpha)


def _blend_sgm(
    blender: nn.Module, eager: Any, x_spatial: torch.Tensor, x_temporal: torch.Tensor,
    image_only_indicator: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    if x_spatial.dtype != x_temporal.dtype:
        return eager(blender, x_spatial, x_temporal, image_only_indicator)
    return torch.lerp(x_temporal, x_spatial, blender.get_alpha(image_only_indicator).to(x_spatial.dtype))


_STACKED = "GroupNorm and SiLU in one pass, 4 times; convolutions and sums without permuted copies"
register(
    Target(("TemporalConvLayer",), _STACKED, _check_layer, _layer, temporal=True),
    Target(("TemporalConvBlock", "TemporalConvBlock_v2"), _STACKED, _check_latent, _latent, temporal=True),
    Target(("TemporalResnetBlock",), "GroupNorm and SiLU in one pass, twice; the time embedding added by the"
           " convolution", _check_block, _block, temporal=True),
    Target(("AlphaBlender",), "the mixture in one pass", _check_blender, _blend),
    Target(("AlphaBlender",), "the mixture in one pass", _check_sgm_blender, _blend_sgm),
)  # fmt: skip
