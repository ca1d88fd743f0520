"""ResNet blocks of diffusers' video autoencoders: GroupNorm, over a clip or over each frame, and SiLU in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvdiff.swap.frames import as_frames, dense, onto
from fastvdiff.swap.target import Target, dropping, plain, register, silu, untouched, unwatched

from .sequences import fuses, norm_silu


def _norm_of(module: nn.Module) -> nn.GroupNorm | None:
    """The GroupNorm of a block's norm, which may be a module around it."""
    if type(module).__name__ == "MochiChunkedGroupNorm3D" and untouched(module):
        module = module.norm_layer
    return module if plain(module, nn.GroupNorm) else None


def _check(block: nn.Module) -> str | None:
    for name in ("norm1", "norm2"):
        norm = getattr(block, name, None)
        if norm is None or _norm_of(norm) is None:
            return f"{name} is {type(norm).__name__}: no kernel for it"
    if not silu(block.nonlinearity):
        return f"its nonlinearity is {type(block.nonlinearity).__name__}, not SiLU"
    return None


def _ready(block: nn.Module, x: torch.Tensor, per_frame: bool) -> bool:
    first, last = _norm_of(block.norm1), _norm_of(block.norm2)
    if first is None or last is None or not silu(block.nonlinearity) or dropping(block):
        return False
    return fuses(x[:, :, 0] if per_frame else x, first)


def _activated(x: torch.Tensor, norm: nn.Module, per_frame: bool) -> torch.Tensor:
    """SiLU(norm(x)) of a video (B, C, T, H, W), in channels_last_3d if x is."""
    norm = _norm_of(norm)
    if not per_frame:
        return norm_silu(dense(x), norm)
    return norm_silu(as_frames(dense(x)), norm).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def _hunyuan(block: nn.Module, eager: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if not _ready(block, hidden_states, False):
        return eager(block, hidden_states)
    x = dense(hidden_states)
    h = block.conv1(_activated(x, block.norm1, False))
    h = block.conv2(_activated(h, block.norm2, False))
    return onto(h, x if block.conv_shortcut is None else block.conv_shortcut(x), unwatched(block.conv2))


def _cogvideox(
    block: nn.Module, eager: Any, inputs: torch.Tensor, temb: torch.Tensor | None = None,
    zq: torch.Tensor | None = None, conv_cache: dict[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    if zq is not None or not _ready(block, inputs, False):
        return eager(block, inputs, temb, zq, conv_cache)
    caches, new = conv_cache or {}, {}
    h, new["conv1"] = block.conv1(_activated(inputs, block.norm1, False), conv_cache=caches.get("conv1"))
    if temb is not None:
        h = h + block.temb_proj(block.nonlinearity(temb))[:, :, None, None, None]
    h, new["conv2"] = block.conv2(_activated(h, block.norm2, False), conv_cache=caches.get("conv2"))
    shortcut = inputs
    if block.in_channels != block.out_channels:
        if block.use_conv_shortcut:
            shortcut, new["conv_shortcut"] = block.conv_shortcut(inputs, conv_cache=caches.get("conv_shortcut"))
        else:
            shortcut = block.conv_shortcut(inputs)
    return h + shortcut, new


def _mochi(
    block: nn.Module, eager: Any, inputs: torch.Tensor, conv_cache: dict[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    if not _ready(block, inputs, True):
        return eager(block, inputs, conv_cache)
    caches, new = conv_cache or {}, {}
    h, new["conv1"] = block.conv1(_activated(inputs, block.norm1, True), conv_cache=caches.get("conv1"))
    h, new["conv2"] = block.conv2(_activated(h, block.norm2, True), conv_cache=caches.get("conv2"))
    return h + inputs, new


def _easyanimate(block: nn.Module, eager: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    per_frame = block.spatial_group_norm
    if not _ready(block, hidden_states, per_frame):
        return eager(block, hidden_states)
    shortcut = block.shortcut(hidden_states)
    h = block.conv1(_activated(hidden_states, block.norm1, per_frame))
    h = block.conv2(_activated(h, block.norm2, per_frame))
    y = onto(h, shortcut, unwatched(block.conv2))
    return y if block.output_scale_factor == 1 else y / block.output_scale_factor


_WHAT = "GroupNorm and SiLU in one pass, twice"
register(
    Target(("HunyuanVideoResnetBlockCausal3D",), _WHAT, _check, _hunyuan),
    Target(("CogVideoXResnetBlock3D",), _WHAT, _check, _cogvideox),
    Target(("MochiResnetBlock3D",), _WHAT + ", over each frame", _check, _mochi),
    Target(("EasyAnimateResidualBlock3D",), _WHAT, _check, _easyanimate),
)
