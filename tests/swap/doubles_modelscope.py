"""ModelScope's UNetSD in small: its classes where they are not VideoCrafter's, with the same fields, keys and maths."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import nn

from tests.swap import doubles_lvdm as lvdm


class TemporalConvBlock_v2(nn.Module):  # noqa: N801
    def __init__(self, channels: int, use_image_dataset: bool = False) -> None:
        super().__init__()
        self.use_image_dataset = use_image_dataset
        for name, stack in lvdm.TemporalConvBlock(channels).named_children():
            self.add_module(name, stack)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        return x + 0.0 * y if self.use_image_dataset else x + y


class ResBlock(lvdm.ResBlock):
    norm = nn.GroupNorm

    def __init__(self, channels: int, emb_channels: int, *args: Any, use_image_dataset: bool = False) -> None:
        self.use_image_dataset = use_image_dataset
        super().__init__(channels, emb_channels, *args, use_temporal_conv=True)

    def temporal(self, channels: int, spatial_aware: bool) -> nn.Module:
        return TemporalConvBlock_v2(channels, self.use_image_dataset)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, batch_size: int) -> torch.Tensor:
        return self._forward(x, emb, batch_size)


class BasicTransformerBlock(nn.Module):
    """It has the flag for checkpointing, and does not look at it."""

    def __init__(self, dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.attn1, self.attn2 = lvdm.CrossAttention(dim), lvdm.CrossAttention(dim, context_dim)
        self.ff = lvdm.FeedForward(dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.checkpoint = True

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class TemporalTransformer(nn.Module):
    def __init__(self, in_channels: int, multiply_zero: bool = False) -> None:
        super().__init__()
        self.multiply_zero, self.only_self_att, self.use_linear = multiply_zero, True, False
        self.norm = nn.GroupNorm(lvdm.GROUPS, in_channels, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv1d(in_channels, in_channels, 1), nn.Conv1d(in_channels, in_channels, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(in_channels)])

    def forward(self, x: torch.Tensor, context: Any = None) -> torch.Tensor:
        batch, _, _, height, width = x.shape
        h = self.proj_in(rearrange(self.norm(x), "b c f h w -> (b h w) c f")).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h)
        h = rearrange(self.proj_out(h.transpose(1, 2)), "(b h w) c f -> b c f h w", b=batch, h=height, w=width)
        return 0.0 * h + x if self.multiply_zero else h.contiguous() + x


class UNetSD(nn.Module):
    """A ResBlock, both transformers and another ResBlock."""

    def __init__(self, dim: int = 16, context_dim: int = 12, use_image_dataset: bool = False) -> None:
        super().__init__()
        emb = 4 * dim
        self.time_embed = nn.Sequential(nn.Linear(1, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.init = nn.Conv2d(4, dim, 3, padding=1)
        self.resblocks = nn.ModuleList([
            ResBlock(dim, emb, 2 * dim, use_image_dataset=use_image_dataset),
            ResBlock(2 * dim, emb, use_image_dataset=use_image_dataset),
        ])  # fmt: skip
        self.spatial = lvdm.SpatialTransformer(2 * dim, context_dim, BasicTransformerBlock)
        self.temporal = TemporalTransformer(2 * dim, multiply_zero=use_image_dataset)
        self.out = nn.Sequential(nn.GroupNorm(lvdm.GROUPS, 2 * dim), nn.SiLU(), nn.Conv2d(2 * dim, 4, 3, padding=1))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        batch, _, frames = x.shape[:3]
        emb = self.time_embed(t.to(x.dtype)[:, None] / 1000).repeat_interleave(frames, dim=0)
        h = self.resblocks[0](self.init(rearrange(x, "b c f h w -> (b f) c h w")), emb, batch)
        h = self.spatial(h, y.repeat_interleave(frames, dim=0))
        h = self.temporal(rearrange(h, "(b f) c h w -> b c f h w", b=batch))
        h = self.resblocks[1](rearrange(h, "b c f h w -> (b f) c h w"), emb, batch)
        return rearrange(self.out(h), "(b f) c h w -> b c f h w", b=batch)
