"""ResNet blocks of MONAI's diffusion U-Net and autoencoder, for images and volumes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvdiff.swap.chains import convolved, normalised
from fastvdiff.swap.target import UNRELATED, Target, plain, register, silu, takes, untouched

from .sequences import fuses, norm_silu


def _only(wrapper: nn.Module, x: torch.Tensor) -> nn.Module | None:
    """The one convolution inside MONAI's Convolution, for x, or None where there is more or other than that."""
    parts = list(wrapper) if isinstance(wrapper, nn.Sequential) and untouched(wrapper) else []
    kind = nn.Conv3d if x.dim() == 5 else nn.Conv2d
    return parts[0] if len(parts) == 1 and plain(parts[0], kind) else None


def _between(
    block: nn.Module, h: torch.Tensor, shortcut: torch.Tensor, per_channel: torch.Tensor | None = None
) -> torch.Tensor:
    """conv2(SiLU(norm2(conv1(h) + per_channel))) + shortcut, per_channel (B, C)."""
    first, last = _only(block.conv1, h), _only(block.conv2, h)
    h, stats = convolved(block.conv1 if first is None else first, h, block.norm2, per_channel)
    fused = normalised(block.norm2, last, h, stats, residual=shortcut)
    if fused is not None:
        return fused[0]
    last = block.conv2 if last is None else last
    return convolved(last, norm_silu(h, block.norm2, stats=stats), None, residual=shortcut)[0]


def _check_norms(block: nn.Module) -> str | None:
    for name in ("norm1", "norm2"):
        if not isinstance(getattr(block, name), nn.GroupNorm):
            return f"{name} is {type(getattr(block, name)).__name__}, not GroupNorm"
    return None


def _check_diffusion(block: nn.Module) -> str | None:
    if not takes(block, "x", "emb"):
        return UNRELATED
    if not silu(block.nonlinearity):
        return f"its nonlinearity is {type(block.nonlinearity).__name__}, not SiLU"
    return _check_norms(block)


def _diffusion(block: nn.Module, eager: Any, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    understood = silu(block.nonlinearity) and plain(block.norm2, nn.GroupNorm) and emb.dim() == 2
    if not understood or not fuses(x, block.norm1):
        return eager(block, x, emb)
    h = norm_silu(x, block.norm1)
    resample = block.upsample if block.upsample is not None else block.downsample
    if resample is not None:
        x, h = resample(x), resample(h)
    emb = block.time_emb_proj(block.nonlinearity(emb)).to(h.dtype)
    return _between(block, h, block.skip_connection(x), emb)


def _check_autoencoder(block: nn.Module) -> str | None:
    return _check_norms(block) if takes(block, "x") else UNRELATED


def _autoencoder(block: nn.Module, eager: Any, x: torch.Tensor) -> torch.Tensor:
    if not (plain(block.norm2, nn.GroupNorm) and fuses(x, block.norm1)):
        return eager(block, x)
    return _between(block, norm_silu(x, block.norm1), block.nin_shortcut(x))


_WHAT = "GroupNorm and SiLU in one pass, twice; the sums in the convolutions"
register(
    Target(("DiffusionUNetResnetBlock",), _WHAT, _check_diffusion, _diffusion, covers=2),
    Target(("AEKLResBlock",), _WHAT, _check_autoencoder, _autoencoder, covers=2),
)
