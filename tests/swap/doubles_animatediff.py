"""AnimateDiff's own U-Net blocks in small: the same class names, fields, keys and maths."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class InflatedConv3d(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = super().forward(rearrange(x, "b c f h w -> (b f) c h w"))
        return rearrange(frames, "(b f) c h w -> b c f h w", f=x.shape[2])


class InflatedGroupNorm(nn.GroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = super().forward(rearrange(x, "b c f h w -> (b f) c h w"))
        return rearrange(frames, "(b f) c h w -> b c f h w", f=x.shape[2])


class ResnetBlock3D(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, temb_channels: int, groups: int = 4, dropout: float = 0.0,
        time_embedding_norm: str = "default", use_inflated_groupnorm: bool = True, nonlinearity: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        norm = InflatedGroupNorm if use_inflated_groupnorm else nn.GroupNorm
        self.time_embedding_norm, self.output_scale_factor = time_embedding_norm, 1.0
        self.norm1, self.norm2 = norm(groups, in_channels, eps=1e-6), norm(groups, out_channels, eps=1e-6)
        self.conv1 = InflatedConv3d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels * (1 if time_embedding_norm == "default" else 2))
        self.dropout = nn.Dropout(dropout)
        self.conv2 = InflatedConv3d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = nonlinearity or nn.SiLU()
        self.conv_shortcut = InflatedConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        temb = self.time_emb_proj(self.nonlinearity(temb))[..., None, None, None]
        if self.time_embedding_norm == "default":
            h = self.norm2(h + temb)
        else:
            scale, shift = temb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(self.nonlinearity(h)))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return (shortcut + h) / self.output_scale_factor


class PositionalEncoding(nn.Module):
    def __init__(self, d_model: int, max_len: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)
        angles = torch.arange(max_len)[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, d_model, 2) / d_model)
        self.register_buffer("pe", torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x + self.pe[:, : x.size(1)])


class VersatileAttention(nn.Module):
    def __init__(self, dim: int, heads: int, max_len: int, cross: bool = False) -> None:
        super().__init__()
        self.attention_mode, self.is_cross_attention = "Temporal", cross
        self.heads, self.scale, self.inner_dim = heads, (dim // heads) ** -0.5, dim
        self.group_norm = self.added_kv_proj_dim = None
        self.upcast_attention = self.upcast_softmax = False
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.pos_encoder = PositionalEncoding(dim, max_len)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
        video_length: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        positions = hidden_states.shape[1]
        x = self.pos_encoder(rearrange(hidden_states, "(b f) d c -> (b d) f c", f=video_length))
        text = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            rearrange(layer(t), "b n (h d) -> b h n d", h=self.heads)
            for layer, t in ((self.to_q, x), (self.to_k, text), (self.to_v, text))
        )
        y = (q @ k.transpose(-1, -2) * self.scale).softmax(dim=-1) @ v
        for layer in (lambda t: rearrange(t, "b h n d -> b n (h d)"), *self.to_out):
            y = layer(y)
        return rearrange(y, "(b d) f c -> (b f) d c", d=positions)


class GEGLU(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.net[0](x).chunk(2, dim=-1)
        return self.net[1](value * F.gelu(gate))


class TemporalTransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, max_len: int, cross: bool) -> None:
        super().__init__()
        self.attention_blocks = nn.ModuleList([VersatileAttention(dim, heads, max_len, cross) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(2)])
        self.ff, self.ff_norm = GEGLU(dim), nn.LayerNorm(dim)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
        video_length: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        x = hidden_states
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            x = attention(norm(x), video_length=video_length) + x
        return self.ff(self.ff_norm(x)) + x


class TemporalTransformer3DModel(nn.Module):
    def __init__(self, channels: int, heads: int, groups: int, max_len: int, cross: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TemporalTransformerBlock(channels, heads, max_len, cross)])

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> torch.Tensor:
        frames, height = hidden_states.shape[2:4]
        x = rearrange(hidden_states, "b c f h w -> (b f) c h w")
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            h = block(h, encoder_hidden_states=encoder_hidden_states, video_length=frames)
        y = rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=height).contiguous() + x
        return rearrange(y, "(b f) c h w -> b c f h w", f=frames)


class VanillaTemporalModule(nn.Module):
    def __init__(self, channels: int, heads: int = 2, groups: int = 4, max_len: int = 8, cross: bool = False) -> None:
        super().__init__()
        self.temporal_transformer = TemporalTransformer3DModel(channels, heads, groups, max_len, cross)

    def forward(self, input_tensor: torch.Tensor, temb: Any, encoder_hidden_states: Any) -> torch.Tensor:
        return self.temporal_transformer(input_tensor, encoder_hidden_states)


class UNet3DConditionModel(nn.Module):
    """Two ResNet blocks, each with its motion module, between the first and the last convolution."""

    def __init__(self, dim: int = 16, temb: int = 24, **resnet: Any) -> None:
        super().__init__()
        inflated = resnet.get("use_inflated_groupnorm", True)
        self.conv_in = InflatedConv3d(4, dim, 3, padding=1)
        self.time_embedding = nn.Linear(1, temb)
        self.resnets = nn.ModuleList([ResnetBlock3D(dim, 2 * dim, temb, **resnet),
                                      ResnetBlock3D(2 * dim, 2 * dim, temb, **resnet)])  # fmt: skip
        self.motion_modules = nn.ModuleList([VanillaTemporalModule(2 * dim) for _ in range(2)])
        self.conv_norm_out = (InflatedGroupNorm if inflated else nn.GroupNorm)(4, 2 * dim)
        self.conv_out = InflatedConv3d(2 * dim, 4, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x, temb = self.conv_in(sample), self.time_embedding(timestep.to(sample.dtype)[:, None] / 1000)
        for resnet, motion in zip(self.resnets, self.motion_modules, strict=True):
            x = motion(resnet(x, temb), temb, None)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
