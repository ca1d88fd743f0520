"""MONAI's diffusion U-Net and autoencoder blocks in small: the same class names, fields, keys and maths."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = 4


class Convolution(nn.Sequential):
    def __init__(self, spatial_dims: int, channels: int, wide: int, kernel_size: int = 3) -> None:
        super().__init__()
        kind = {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
        self.add_module("conv", kind(channels, wide, kernel_size, padding=kernel_size // 2))


class Resample(nn.Module):
    """WrappedUpsample and DiffusionUnetDownsample without a convolution."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: torch.Tensor, emb: Any = None) -> torch.Tensor:
        if self.up:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return (F.avg_pool2d if x.dim() == 4 else F.avg_pool3d)(x, 2)


class DiffusionUNetResnetBlock(nn.Module):
    def __init__(
        self, spatial_dims: int, in_channels: int, temb_channels: int, out_channels: int | None = None,
        up: bool = False, down: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        wide, self.spatial_dims = out_channels or in_channels, spatial_dims
        self.norm1, self.nonlinearity = nn.GroupNorm(GROUPS, in_channels, eps=1e-6), nn.SiLU()
        self.conv1 = Convolution(spatial_dims, in_channels, wide)
        self.upsample, self.downsample = Resample(True) if up else None, Resample(False) if down else None
        self.time_emb_proj = nn.Linear(temb_channels, wide)
        self.norm2 = nn.GroupNorm(GROUPS, wide, eps=1e-6)
        self.conv2 = Convolution(spatial_dims, wide, wide)
        same = wide == in_channels
        self.skip_connection = nn.Identity() if same else Convolution(spatial_dims, in_channels, wide, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.nonlinearity(self.norm1(x))
        for resample in (self.upsample, self.downsample):
            if resample is not None:
                x, h = resample(x), resample(h)
        h = self.conv1(h)
        h = h + self.time_emb_proj(self.nonlinearity(emb))[(..., *[None] * self.spatial_dims)]
        return self.skip_connection(x) + self.conv2(self.nonlinearity(self.norm2(h)))


class AEKLResBlock(nn.Module):
    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, in_channels), nn.GroupNorm(GROUPS, out_channels)
        self.conv1 = Convolution(spatial_dims, in_channels, out_channels)
        self.conv2 = Convolution(spatial_dims, out_channels, out_channels)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else Convolution(spatial_dims, in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Network(nn.Module):
    """Both kinds of block, down and up."""

    def __init__(self, spatial_dims: int, dim: int = 8) -> None:
        super().__init__()
        self.init, self.out = Convolution(spatial_dims, 3, dim), Convolution(spatial_dims, dim, 3)
        self.time_embed = nn.Sequential(nn.Linear(1, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, 4 * dim))
        self.blocks = nn.ModuleList([
            DiffusionUNetResnetBlock(spatial_dims, dim, 4 * dim, 2 * dim),
            DiffusionUNetResnetBlock(spatial_dims, 2 * dim, 4 * dim, down=True),
            DiffusionUNetResnetBlock(spatial_dims, 2 * dim, 4 * dim, up=True),
        ])  # fmt: skip
        self.decoder = nn.ModuleList([
            AEKLResBlock(spatial_dims, 2 * dim, dim), AEKLResBlock(spatial_dims, dim, dim),
        ])  # fmt: skip

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        emb, h = self.time_embed(timesteps.to(x.dtype)[:, None] / 1000), self.init(x)
        for block in self.blocks:
            h = block(h, emb)
        for block in self.decoder:
            h = block(h)
        return self.out(h)
