"""VideoCrafter's (LVDM's) U-Net blocks in small: the same class names, fields, keys and maths."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

GROUPS = 4


class GroupNormSpecific(nn.GroupNorm):
    """In float32, whatever comes (float64 stays, which the library does not do)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.dtype == torch.float64 else x.float()).type(x.dtype)


class RelativePosition(nn.Module):
    def __init__(self, num_units: int, max_relative_position: int) -> None:
        super().__init__()
        self.max_relative_position = max_relative_position
        self.embeddings_table = nn.Parameter(torch.randn(2 * max_relative_position + 1, num_units))

    def forward(self, length_q: int, length_k: int) -> torch.Tensor:
        distance = torch.arange(length_k)[None, :] - torch.arange(length_q)[:, None]
        furthest = self.max_relative_position
        return self.embeddings_table[distance.clamp(-furthest, furthest) + furthest]


class CrossAttention(nn.Module):
    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 2, dim_head: int = 8, dropout: float = 0.0,
        relative_position: bool = False, temporal_length: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        inner, context_dim = heads * dim_head, context_dim or query_dim
        self.scale, self.heads, self.dim_head = dim_head**-0.5, heads, dim_head
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k, self.to_v = nn.Linear(context_dim, inner, bias=False), nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))
        self.img_cross_attention, self.relative_position = False, relative_position
        if relative_position:
            self.relative_position_k = RelativePosition(dim_head, temporal_length)
            self.relative_position_v = RelativePosition(dim_head, temporal_length)

    def forward(self, x: torch.Tensor, context: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (
            rearrange(layer(t), "b n (h d) -> b h n d", h=self.heads)
            for layer, t in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        scores = q @ k.transpose(-1, -2) * self.scale
        if self.relative_position:
            keys = self.relative_position_k(q.shape[2], k.shape[2])
            scores = scores + torch.einsum("bhtd,tsd->bhts", q, keys) * self.scale
        if mask is not None:
            scores = scores.masked_fill(~(mask[:, None] > 0.5), -torch.finfo(scores.dtype).max)
        weights = scores.softmax(dim=-1)
        y = weights @ v
        if self.relative_position:
            y = y + torch.einsum("bhts,tsd->bhtd", weights, self.relative_position_v(q.shape[2], k.shape[2]))
        return self.to_out(rearrange(y, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int, dim_out: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 2 * dim), nn.Dropout(dropout), nn.Linear(2 * dim, dim_out or dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    def __init__(
        self, dim: int, context_dim: int | None = None, checkpoint: bool = True, attention_cls: Any = CrossAttention,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attn1 = attention_cls(dim, dropout=dropout)
        self.attn2 = attention_cls(dim, context_dim, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.checkpoint = checkpoint

    def forward(self, x: torch.Tensor, context: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, context, mask, use_reentrant=False)
        return self._forward(x, context, mask)

    def _forward(self, x: torch.Tensor, context: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.attn1(self.norm1(x), mask=mask) + x
        x = self.attn2(self.norm2(x), context=context, mask=mask) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context_dim: int, block: Any = BasicTransformerBlock) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([block(channels, context_dim)])

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            h = block(h, context=context)
        return rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=x.shape[2]) + x


class TemporalTransformer(nn.Module):
    def __init__(
        self, in_channels: int, use_linear: bool = False, only_self_att: bool = True, causal_attention: bool = False,
        relative_position: bool = False, temporal_length: int = 5, use_checkpoint: bool = True, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.only_self_att, self.causal_attention, self.use_linear = only_self_att, causal_attention, use_linear
        self.norm = nn.GroupNorm(GROUPS, in_channels, eps=1e-6)
        project = nn.Linear if use_linear else partial(nn.Conv1d, kernel_size=1)
        self.proj_in, self.proj_out = project(in_channels, in_channels), project(in_channels, in_channels)
        attention = partial(CrossAttention, relative_position=relative_position, temporal_length=temporal_length)
        block = BasicTransformerBlock(in_channels, checkpoint=use_checkpoint, attention_cls=attention, dropout=dropout)
        self.transformer_blocks = nn.ModuleList([block])
        if causal_attention:
            self.mask = torch.tril(torch.ones(1, temporal_length, temporal_length))

    def forward(self, x: torch.Tensor, context: Any = None) -> torch.Tensor:
        batch, _, _, height, width = x.shape
        h = rearrange(self.norm(x), "b c t h w -> (b h w) c t")
        h = self.proj_in(h.transpose(1, 2)) if self.use_linear else self.proj_in(h).transpose(1, 2)
        mask = self.mask.to(x.device).repeat(len(h), 1, 1) if self.causal_attention else None
        for block in self.transformer_blocks:
            h = block(h, mask=mask)
        h = self.proj_out(h).transpose(1, 2) if self.use_linear else self.proj_out(h.transpose(1, 2))
        return rearrange(h, "(b h w) c t -> b c t h w", b=batch, h=height, w=width).contiguous() + x


class TemporalConvBlock(nn.Module):
    def __init__(self, channels: int, dropout: float = 0.1, spatial_aware: bool = False) -> None:
        super().__init__()
        wide = ((3, 3, 3), (1, 1, 1)) if spatial_aware else ((3, 1, 1), (1, 0, 0))
        for i, (kernel, padding) in enumerate((wide, wide, ((3, 1, 1), (1, 0, 0)), ((3, 1, 1), (1, 0, 0)))):
            middle = [nn.Dropout(dropout)] if i else []
            norm, conv = nn.GroupNorm(GROUPS, channels), nn.Conv3d(channels, channels, kernel, padding=padding)
            self.add_module(f"conv{i + 1}", nn.Sequential(norm, nn.SiLU(), *middle, conv))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv4(self.conv3(self.conv2(self.conv1(x)))) + x


class Resample(nn.Module):
    """Upsample and Downsample without a convolution."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.up else F.avg_pool2d(x, 2)


class ResBlock(nn.Module):
    norm: Any = GroupNormSpecific

    def __init__(
        self, channels: int, emb_channels: int, out_channels: int | None = None, dropout: float = 0.1,
        use_scale_shift_norm: bool = False, up: bool = False, down: bool = False, use_temporal_conv: bool = False,
        tempspatial_aware: bool = False, use_checkpoint: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        wide = out_channels or channels
        self.updown, self.use_scale_shift_norm = up or down, use_scale_shift_norm
        self.use_temporal_conv, self.use_checkpoint = use_temporal_conv, use_checkpoint
        first, last = nn.Conv2d(channels, wide, 3, padding=1), nn.Conv2d(wide, wide, 3, padding=1)
        self.in_layers = nn.Sequential(self.norm(GROUPS, channels), nn.SiLU(), first)
        self.h_upd, self.x_upd = (Resample(up) if self.updown else nn.Identity() for _ in range(2))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, wide * (1 + use_scale_shift_norm)))
        self.out_layers = nn.Sequential(self.norm(GROUPS, wide), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Conv2d(channels, wide, 1) if channels != wide else nn.Identity()
        if use_temporal_conv:
            self.temopral_conv = self.temporal(wide, tempspatial_aware)

    def temporal(self, channels: int, spatial_aware: bool) -> nn.Module:
        return TemporalConvBlock(channels, spatial_aware=spatial_aware)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, batch_size=batch_size, use_reentrant=False)
        return self._forward(x, emb, batch_size=batch_size)

    def _forward(self, x: torch.Tensor, emb: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
        h = self.in_layers[-1](self.h_upd(self.in_layers[:-1](x)))
        x = self.x_upd(x)
        projected = self.emb_layers(emb).type(h.dtype)[..., None, None]
        if self.use_scale_shift_norm:
            scale, shift = projected.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + projected)
        h = self.skip_connection(x) + h
        if self.use_temporal_conv and batch_size:
            h = self.temopral_conv(rearrange(h, "(b t) c h w -> b c t h w", b=batch_size))
            h = rearrange(h, "b c t h w -> (b t) c h w")
        return h


class UNetModel(nn.Module):
    """One level down, the middle and one level up."""

    def __init__(self, dim: int = 16, context_dim: int = 12, transformer: Any = None, **resnet: Any) -> None:
        super().__init__()
        transformer = transformer or {}
        emb = 4 * dim
        self.time_embed = nn.Sequential(nn.Linear(1, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.init = nn.Conv2d(4, dim, 3, padding=1)
        self.blocks = nn.ModuleList([
            ResBlock(dim, emb, 2 * dim, **resnet), SpatialTransformer(2 * dim, context_dim),
            TemporalTransformer(2 * dim, **transformer), ResBlock(2 * dim, emb, down=True, **resnet),
            ResBlock(2 * dim, emb, up=True, **resnet),
        ])  # fmt: skip
        self.out = nn.Sequential(GroupNormSpecific(GROUPS, 2 * dim), nn.SiLU(), nn.Conv2d(2 * dim, 4, 3, padding=1))

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        batch, _, frames = x.shape[:3]
        emb = self.time_embed(timesteps.to(x.dtype)[:, None] / 1000).repeat_interleave(frames, dim=0)
        context = context.repeat_interleave(frames, dim=0)
        h = self.init(rearrange(x, "b c t h w -> (b t) c h w"))
        for block in self.blocks:
            if isinstance(block, ResBlock):
                h = block(h, emb, batch)
            elif isinstance(block, SpatialTransformer):
                h = block(h, context)
            else:
                h = rearrange(block(rearrange(h, "(b t) c h w -> b c t h w", b=batch)), "b c t h w -> (b t) c h w")
        return rearrange(self.out(h), "(b t) c h w -> b c t h w", b=batch)
