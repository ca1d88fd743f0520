"""ResNet blocks of MONAI's diffusion U-Net and autoencoder, for images and volumes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvdiff.swap.frames import convolve, onto, over_space
from fastvdiff.swap.target import UNRELATED, Target, plain, register, silu, takes, untouched

from .sequences import fuses, norm_silu


def _only(wrapper: nn.Module, kind: type) -> nn.Module | None:
    """The one convolution inside MONAI's Convolution, or None where there is more or other than that."""
    parts = list(wrapper) if isinstance(wrapper, nn.Sequential) and untouched(wrapper) else []
    return parts[0] if len(parts) == 1 and plain(parts[0], kind) else None


def _convolve(
    wrapper: nn.Module, x: torch.Tensor, per_channel: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """wrapper(x) + per_channel (B, C) + residual; in one call where it is a plain Conv3d."""
    conv = _only(wrapper, nn.Conv3d) if x.dim() == 5 else None
    if conv is not None:
        return convolve(conv, x, per_channel, residual)
    y, owned = wrapper(x), _only(wrapper, nn.Conv2d) is not None
    if per_channel is not None:
        y = onto(y, over_space(per_channel, y), owned)
    return y if residual is None else onto(y, residual, owned)


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
    h = _convolve(block.conv1, h, block.time_emb_proj(block.nonlinearity(emb)).to(h.dtype))
    return _convolve(block.conv2, norm_silu(h, block.norm2), residual=block.skip_connection(x))


def _check_autoencoder(block: nn.Module) -> str | None:
    return _check_norms(block) if takes(block, "x") else UNRELATED


def _autoencoder(block: nn.Module, eager: Any, x: torch.Tensor) -> torch.Tensor:
    if not (plain(block.norm2, nn.GroupNorm) and fuses(x, block.norm1)):
        return eager(block, x)
    h = _convolve(block.conv1, norm_silu(x, block.norm1))
    return _convolve(block.conv2, norm_silu(h, block.norm2), residual=block.nin_shortcut(x))


_WHAT = "GroupNorm and SiLU in one pass, twice; the sums in the convolutions"
register(
    Target(("DiffusionUNetResnetBlock",), _WHAT, _check_diffusion, _diffusion, covers=2),
    Target(("AEKLResBlock",), _WHAT, _check_autoencoder, _autoencoder, covers=2),
)
