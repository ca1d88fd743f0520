"""Stability's sgm video U-Net blocks in small: the same class names, fields, keys and maths."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.swap import doubles_lvdm as lvdm


class GroupNorm32(nn.GroupNorm):
    """In float32, whatever comes (float64 stays, which the library does not do)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.dtype == torch.float64 else x.float()).type(x.dtype)


def timestep_embedding(
    timesteps: torch.Tensor, dim: int, max_period: int = 10000, repeat_only: bool = False
) -> torch.Tensor:
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    angles = timesteps[:, None].float() * frequencies[None].to(timesteps.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class AlphaBlender(nn.Module):
    def __init__(self, merge_strategy: str, rearrange_pattern: str = "b t -> (b t) 1 1") -> None:
        super().__init__()
        self.merge_strategy, self.rearrange_pattern = merge_strategy, rearrange_pattern
        if merge_strategy == "fixed":
            self.register_buffer("mix_factor", torch.tensor([0.3]))
        else:
            self.register_parameter("mix_factor", nn.Parameter(torch.tensor([0.3])))

    def get_alpha(self, image_only_indicator: torch.Tensor | None) -> torch.Tensor:
        if self.merge_strategy == "fixed":
            return self.mix_factor
        alpha = self.mix_factor.sigmoid()
        if self.merge_strategy == "learned":
            return alpha
        ones = torch.ones(1, 1, dtype=alpha.dtype)
        return rearrange(torch.where(image_only_indicator.bool(), ones, alpha[..., None]), self.rearrange_pattern)

    def forward(
        self, x_spatial: torch.Tensor, x_temporal: torch.Tensor, image_only_indicator: torch.Tensor | None = None
    ) -> torch.Tensor:
        alpha = self.get_alpha(image_only_indicator)
        return alpha.to(x_spatial.dtype) * x_spatial + (1.0 - alpha).to(x_spatial.dtype) * x_temporal


class ResBlock(nn.Module):
    def __init__(
        self, channels: int, emb_channels: int, dropout: float = 0.1, out_channels: int | None = None, dims: int = 2,
        kernel_size: Any = 3, use_checkpoint: bool = False, exchange_temb_dims: bool = False,
        use_scale_shift_norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        wide, convolution = out_channels or channels, {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        padding = [k // 2 for k in kernel_size] if isinstance(kernel_size, list) else kernel_size // 2
        self.updown, self.use_scale_shift_norm, self.skip_t_emb = False, use_scale_shift_norm, False
        self.use_checkpoint, self.exchange_temb_dims = use_checkpoint, exchange_temb_dims
        first, last = (convolution(c, wide, kernel_size, padding=padding) for c in (channels, wide))
        self.in_layers = nn.Sequential(GroupNorm32(lvdm.GROUPS, channels), nn.SiLU(), first)
        self.h_upd = self.x_upd = nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, wide * (1 + use_scale_shift_norm)))
        self.out_layers = nn.Sequential(GroupNorm32(lvdm.GROUPS, wide), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = convolution(channels, wide, 1) if channels != wide else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if self.use_checkpoint:
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x)
        projected = self.emb_layers(emb).type(h.dtype)
        while projected.dim() < h.dim():
            projected = projected[..., None]
        if self.use_scale_shift_norm:
            scale, shift = projected.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            if self.exchange_temb_dims:
                projected = rearrange(projected, "b t c ... -> b c t ...")
            h = self.out_layers(h + projected)
        return self.skip_connection(x) + h


class VideoResBlock(ResBlock):
    def __init__(
        self, channels: int, emb_channels: int, out_channels: int | None = None, merge_strategy: str = "learned",
        video_kernel_size: Any = (3, 1, 1), **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(channels, emb_channels, out_channels=out_channels, **options)
        options.pop("use_scale_shift_norm", None)
        self.time_stack = ResBlock(
            out_channels or channels, emb_channels, dims=3, kernel_size=list(video_kernel_size),
            exchange_temb_dims=True, **options,
        )  # fmt: skip
        self.time_mixer = AlphaBlender(merge_strategy, "b t -> b 1 t 1 1")

    def forward(
        self, x: torch.Tensor, emb: torch.Tensor, num_video_frames: int,
        image_only_indicator: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        x = rearrange(super().forward(x, emb), "(b t) c h w -> b c t h w", t=num_video_frames)
        mixed = self.time_stack(x, rearrange(emb, "(b t) ... -> b t ...", t=num_video_frames))
        x = self.time_mixer(x_spatial=x, x_temporal=mixed, image_only_indicator=image_only_indicator)
        return rearrange(x, "b c t h w -> (b t) c h w")


class VideoTransformerBlock(nn.Module):
    def __init__(
        self, dim: int, context_dim: int | None, use_checkpoint: bool, ff_in: bool, inner_dim: int,
        disable_temporal_crossattention: bool = False, disable_self_attn: bool = False, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.is_res, self.ff_in, self.timesteps = inner_dim == dim, ff_in or inner_dim != dim, None
        if self.ff_in:
            self.norm_in, self.ff_in = nn.LayerNorm(dim), lvdm.FeedForward(dim, inner_dim, dropout)
        self.disable_self_attn, self.switch_temporal_ca_to_sa = disable_self_attn, False
        self.attn1 = lvdm.CrossAttention(inner_dim, context_dim if disable_self_attn else None)
        self.ff = lvdm.FeedForward(inner_dim, dim, dropout)
        self.attn2 = None
        if not disable_temporal_crossattention:
            self.norm2, self.attn2 = nn.LayerNorm(inner_dim), lvdm.CrossAttention(inner_dim, context_dim)
        self.norm1, self.norm3 = nn.LayerNorm(inner_dim), nn.LayerNorm(inner_dim)
        self.checkpoint = use_checkpoint

    def forward(self, x: torch.Tensor, context: Any = None, timesteps: int | None = None) -> torch.Tensor:
        if self.checkpoint:
            return checkpoint(self._forward, x, context, timesteps, use_reentrant=False)
        return self._forward(x, context, timesteps=timesteps)

    def _forward(self, x: torch.Tensor, context: Any = None, timesteps: int | None = None) -> torch.Tensor:
        positions = x.shape[1]
        x = rearrange(x, "(b t) s c -> (b s) t c", t=timesteps)
        if self.ff_in:
            h = self.ff_in(self.norm_in(x))
            x = h + x if self.is_res else h
        x = self.attn1(self.norm1(x), context=context if self.disable_self_attn else None) + x
        if self.attn2 is not None:
            x = self.attn2(self.norm2(x), context=context) + x
        h = self.ff(self.norm3(x))
        return rearrange(h + x if self.is_res else h, "(b s) t c -> (b t) s c", s=positions)


class SpatialVideoTransformer(nn.Module):
    def __init__(
        self, in_channels: int, context_dim: int, use_linear: bool = True, use_spatial_context: bool = True,
        merge_strategy: str = "learned_with_images", ff_in: bool = True, use_checkpoint: bool = False, **block: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm = nn.GroupNorm(lvdm.GROUPS, in_channels, eps=1e-6)
        project = nn.Linear if use_linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.proj_in, self.proj_out = project(in_channels, in_channels), project(in_channels, in_channels)
        self.transformer_blocks = nn.ModuleList([
            lvdm.BasicTransformerBlock(in_channels, context_dim, use_checkpoint)
        ])  # fmt: skip
        self.time_stack = nn.ModuleList([
            VideoTransformerBlock(in_channels, context_dim, use_checkpoint, ff_in, in_channels, **block)
        ])  # fmt: skip
        self.use_linear, self.use_spatial_context, self.in_channels = use_linear, use_spatial_context, in_channels
        self.max_time_embed_period = 10000
        wide = 4 * in_channels
        self.time_pos_embed = nn.Sequential(nn.Linear(in_channels, wide), nn.SiLU(), nn.Linear(wide, in_channels))
        self.time_mixer = AlphaBlender(merge_strategy)

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None = None, time_context: torch.Tensor | None = None,
        timesteps: int | None = None, image_only_indicator: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        height, width = x.shape[2:]
        shortcut, spatial = x, context
        if self.use_spatial_context:
            time_context = repeat(context[::timesteps], "b ... -> (b n) ...", n=height * width)
        elif time_context is not None:
            time_context = repeat(time_context, "b ... -> (b n) ...", n=height * width)
            if time_context.ndim == 2:
                time_context = rearrange(time_context, "b c -> b 1 c")
        x = self.norm(x)
        x = x if self.use_linear else self.proj_in(x)
        x = rearrange(x, "b c h w -> b (h w) c")
        x = self.proj_in(x) if self.use_linear else x
        frames = repeat(torch.arange(timesteps), "t -> (b t)", b=x.shape[0] // timesteps)
        embedded = timestep_embedding(frames, self.in_channels, max_period=self.max_time_embed_period)
        emb = self.time_pos_embed(embedded.to(x.dtype))[:, None]
        for block, mix_block in zip(self.transformer_blocks, self.time_stack, strict=True):
            x = block(x, context=spatial)
            mixed = mix_block(x + emb, context=time_context, timesteps=timesteps)
            x = self.time_mixer(x_spatial=x, x_temporal=mixed, image_only_indicator=image_only_indicator)
        x = self.proj_out(x) if self.use_linear else x
        x = rearrange(x, "b (h w) c -> b c h w", h=height, w=width)
        return (x if self.use_linear else self.proj_out(x)) + shortcut


class VideoUNet(nn.Module):
    """A residual block, a transformer and another residual block."""

    def __init__(
        self, dim: int = 16, context_dim: int = 12, transformer: Any = None, **resnet: Any
    ) -> None:  # fmt: skip
        super().__init__()
        emb = 4 * dim
        self.time_embed = nn.Sequential(nn.Linear(1, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.init = nn.Conv2d(4, dim, 3, padding=1)
        self.blocks = nn.ModuleList([
            VideoResBlock(dim, emb, 2 * dim, **resnet),
            SpatialVideoTransformer(2 * dim, context_dim, **(transformer or {})),
            VideoResBlock(2 * dim, emb, **resnet),
        ])  # fmt: skip
        self.out = nn.Sequential(GroupNorm32(lvdm.GROUPS, 2 * dim), nn.SiLU(), nn.Conv2d(2 * dim, 4, 3, padding=1))

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, time_context: torch.Tensor | None,
        num_video_frames: int, image_only_indicator: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        emb = self.time_embed(timesteps.to(x.dtype)[:, None] / 1000)
        h = self.blocks[0](self.init(x), emb, num_video_frames, image_only_indicator)
        h = self.blocks[1](h, context, time_context, num_video_frames, image_only_indicator)
        return self.out(self.blocks[2](h, emb, num_video_frames, image_only_indicator))
