"""video-diffusion-pytorch's Unet3D in small: the same class names, fields, keys and maths, two levels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

HEADS, HEAD_DIM = 2, 8


class RotaryEmbedding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(10000.0 ** -(torch.arange(0, dim, 2) / dim), requires_grad=False)

    def rotate_queries_or_keys(self, t: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(t.shape[-2], device=t.device).to(self.freqs.dtype)[:, None] * self.freqs
        turned, rest = t.split((2 * len(self.freqs), t.shape[-1] - 2 * len(self.freqs)), dim=-1)
        even, odd = turned[..., 0::2], turned[..., 1::2]
        pairs = (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin())
        return torch.cat((torch.stack(pairs, dim=-1).flatten(-2), rest), dim=-1)


class RelativePositionBias(nn.Module):
    """The buckets are plain distances here."""

    def __init__(self, heads: int, num_buckets: int = 32) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def forward(self, n: int, device: torch.device) -> torch.Tensor:
        frames = torch.arange(n, device=device)
        distance = frames[None, :] - frames[:, None]
        return self.relative_attention_bias(distance + self.relative_attention_bias.num_embeddings // 2).movedim(-1, 0)


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.fn(x, *args, **kwargs) + x


class LayerNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(1, dim, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        return centred / (x.var(dim=1, unbiased=False, keepdim=True) + self.eps).sqrt() * self.gamma


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=1) * self.scale * self.gamma


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = LayerNorm(dim)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.fn(self.norm(x), **kwargs)


class Block(nn.Module):
    def __init__(self, dim: int, dim_out: int, norm: nn.Module) -> None:
        super().__init__()
        self.proj = nn.Conv3d(dim, dim_out, (1, 3, 3), padding=(0, 1, 1))
        self.norm = norm
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor, scale_shift: Any = None) -> torch.Tensor:
        h = self.norm(self.proj(x))
        if scale_shift is not None:
            h = h * (scale_shift[0] + 1) + scale_shift[1]
        return self.act(h)


class ResnetBlock(nn.Module):
    def __init__(self, dim: int, dim_out: int, *, time_emb_dim: int | None = None, groups: int | None = 4) -> None:
        """Version 0.6 with `groups`, 0.7 without."""
        super().__init__()
        self.mlp = None if time_emb_dim is None else nn.Sequential(nn.SiLU(), nn.Linear(time_emb_dim, dim_out * 2))
        norms = (RMSNorm(dim_out) if groups is None else nn.GroupNorm(groups, dim_out) for _ in range(2))
        self.block1, self.block2 = Block(dim, dim_out, next(norms)), Block(dim_out, dim_out, next(norms))
        self.res_conv = nn.Conv3d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: torch.Tensor, time_emb: torch.Tensor | None = None) -> torch.Tensor:
        scale_shift = None
        if self.mlp is not None:
            scale_shift = rearrange(self.mlp(time_emb), "b c -> b c 1 1 1").chunk(2, dim=1)
        return self.block2(self.block1(x, scale_shift=scale_shift)) + self.res_conv(x)


class SpatialLinearAttention(nn.Module):
    def __init__(self, dim: int, heads: int = HEADS, dim_head: int = HEAD_DIM) -> None:
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, width = x.shape[0], x.shape[-1]
        qkv = self.to_qkv(rearrange(x, "b c f h w -> (b f) c h w"))
        q, k, v = rearrange(qkv, "b (n h c) x y -> n b h c (x y)", n=3, h=self.heads)
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
        y = torch.einsum("bhde,bhdn->bhen", context, q.softmax(dim=-2) * self.scale)
        y = self.to_out(rearrange(y, "b h c (x y) -> b (h c) x y", y=width))
        return rearrange(y, "(b f) c h w -> b c f h w", b=batch)


class EinopsToAndFrom(nn.Module):
    def __init__(self, from_einops: str, to_einops: str, fn: nn.Module) -> None:
        super().__init__()
        self.from_einops, self.to_einops, self.fn = from_einops, to_einops, fn

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        sizes = dict(zip(self.from_einops.split(" "), x.shape, strict=True))
        y = self.fn(rearrange(x, f"{self.from_einops} -> {self.to_einops}"), **kwargs)
        return rearrange(y, f"{self.to_einops} -> {self.from_einops}", **sizes)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int = HEADS, dim_head: int = HEAD_DIM, rotary_emb: Any = None) -> None:
        super().__init__()
        self.scale, self.heads, self.rotary_emb = dim_head**-0.5, heads, rotary_emb
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self, x: torch.Tensor, pos_bias: torch.Tensor | None = None, focus_present_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        frames = x.shape[-2]
        if focus_present_mask is not None and focus_present_mask.all():
            return self.to_out(self.to_qkv(x).chunk(3, dim=-1)[-1])
        q, k, v = rearrange(self.to_qkv(x), "... n (s h d) -> s ... h n d", s=3, h=self.heads)
        q = q * self.scale
        if self.rotary_emb is not None:
            q, k = self.rotary_emb.rotate_queries_or_keys(q), self.rotary_emb.rotate_queries_or_keys(k)
        scores = q @ k.transpose(-1, -2)
        if pos_bias is not None:
            scores = scores + pos_bias
        if focus_present_mask is not None and focus_present_mask.any():
            itself = torch.eye(frames, dtype=torch.bool, device=x.device)
            allowed = rearrange(~focus_present_mask, "b -> b 1 1 1 1") | itself
            scores = scores.masked_fill(~allowed, -torch.finfo(scores.dtype).max)
        return self.to_out(rearrange(scores.softmax(dim=-1) @ v, "... h n d -> ... n (h d)"))


class Unet3D(nn.Module):
    def __init__(self, dim: int = 8, channels: int = 3, groups: int | None = 4) -> None:
        super().__init__()
        rotary = RotaryEmbedding(HEAD_DIM // 2)

        def resnet(dim_in: int, dim_out: int, time: int | None = 4 * dim) -> nn.Module:
            return ResnetBlock(dim_in, dim_out, time_emb_dim=time, groups=groups)

        def temporal(width: int) -> nn.Module:
            attention = Attention(width, rotary_emb=rotary)
            return Residual(PreNorm(width, EinopsToAndFrom("b c f h w", "b (h w) f c", attention)))

        def linear(width: int) -> nn.Module:
            return Residual(PreNorm(width, SpatialLinearAttention(width)))

        wide = 2 * dim
        self.time_rel_pos_bias = RelativePositionBias(HEADS)
        self.init_conv = nn.Conv3d(channels, dim, (1, 7, 7), padding=(0, 3, 3))
        self.init_temporal_attn = temporal(dim)
        self.time_mlp = nn.Sequential(nn.Linear(1, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim))
        down = nn.Conv3d(dim, dim, (1, 4, 4), (1, 2, 2), (0, 1, 1))
        self.downs = nn.ModuleList([nn.ModuleList([resnet(dim, dim), linear(dim), temporal(dim), down])])
        self.mid_block1 = resnet(dim, wide)
        spatial = EinopsToAndFrom("b c f h w", "b f (h w) c", Attention(wide))
        self.mid_spatial_attn = Residual(PreNorm(wide, spatial))
        self.mid_temporal_attn = temporal(wide)
        self.mid_block2 = resnet(wide, wide)
        up = nn.ConvTranspose3d(dim, dim, (1, 4, 4), (1, 2, 2), (0, 1, 1))
        self.ups = nn.ModuleList([nn.ModuleList([resnet(wide, dim), linear(dim), temporal(dim), up])])
        self.final_conv = nn.Sequential(resnet(2 * dim, dim, None), nn.Conv3d(dim, channels, 1))

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, focus_present_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if focus_present_mask is None:
            focus_present_mask = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        bias = self.time_rel_pos_bias(x.shape[2], device=x.device)
        over_frames = {"pos_bias": bias, "focus_present_mask": focus_present_mask}
        x = self.init_temporal_attn(self.init_conv(x), pos_bias=bias)
        skip, t = x.clone(), self.time_mlp(time.to(x.dtype)[:, None] / 1000)
        for block, linear, temporal, resample in self.downs:
            x = resample(temporal(linear(block(x, t)), **over_frames))
        x = self.mid_spatial_attn(self.mid_block1(x, t))
        x = self.mid_block2(self.mid_temporal_attn(x, **over_frames), t)
        for block, linear, temporal, resample in self.ups:
            x = resample(temporal(linear(block(x, t)), **over_frames))
        return self.final_conv(torch.cat((x, skip), dim=1))
