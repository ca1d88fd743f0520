"""imagen-pytorch's video Unet3D in small: the same class names, fields, keys and maths of what works over frames."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

HEADS, HEAD_DIM = 2, 8
EPS_OF_THE_ORACLE = 1e-5  # the library's 1e-3 in float64 is that of 16 bits: a test of those sets it


class LayerNorm(nn.Module):
    def __init__(self, dim: int, stable: bool = False) -> None:
        super().__init__()
        self.stable = stable
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        eps = {torch.float32: 1e-5, torch.float64: EPS_OF_THE_ORACLE}.get(x.dtype, 1e-3)
        variance = x.var(dim=-1, unbiased=False, keepdim=True)
        return (x - x.mean(dim=-1, keepdim=True)) * (variance + eps).rsqrt() * self.g


class ChanRMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=1) * self.scale * self.gamma


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.fn(x, **kwargs) + x


class RearrangeTimeCentric(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, width = x.shape[0], x.shape[-1]
        y = self.fn(rearrange(x, "b c f h w -> (b h w) f c"))
        return rearrange(y, "(b h w) f c -> b c f h w", b=batch, w=width)


class Pad(nn.Module):
    def __init__(self, padding: tuple[int, ...], value: float = 0.0) -> None:
        super().__init__()
        self.padding, self.value = padding, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, self.padding, value=self.value)


class Conv3d(nn.Module):
    def __init__(self, dim: int, dim_out: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.spatial_conv = nn.Conv2d(dim, dim_out, kernel_size, padding=kernel_size // 2)
        self.temporal_conv = nn.Conv1d(dim_out, dim_out, kernel_size) if kernel_size > 1 else None
        self.kernel_size = kernel_size

    def forward(self, x: torch.Tensor, ignore_time: bool = False) -> torch.Tensor:
        batch, height, width = x.shape[0], *x.shape[-2:]
        x = rearrange(self.spatial_conv(rearrange(x, "b c f h w -> (b f) c h w")), "(b f) c h w -> b c f h w", b=batch)
        if ignore_time or self.temporal_conv is None:
            return x
        rows = F.pad(rearrange(x, "b c f h w -> (b h w) c f"), (self.kernel_size - 1, 0))
        return rearrange(self.temporal_conv(rows), "(b h w) c f -> b c f h w", h=height, w=width)


class DynamicPositionBias(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(1, dim), LayerNorm(dim), nn.SiLU())
        self.mlp = nn.ModuleList([first, nn.Linear(dim, heads)])

    def forward(self, n: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        distances = torch.arange(1 - n, n, device=device, dtype=dtype)[:, None]
        for layer in self.mlp:
            distances = layer(distances)
        frames = torch.arange(n, device=device)
        return distances[frames[:, None] - frames + n - 1].movedim(-1, 0)


class Attention(nn.Module):
    def __init__(self, dim: int, *, causal: bool = False, rel_pos_bias: bool = False, scale: float = 8) -> None:
        super().__init__()
        self.scale, self.causal, self.heads = scale, causal, HEADS
        self.rel_pos_bias = DynamicPositionBias(dim, HEADS) if rel_pos_bias else None
        self.norm = LayerNorm(dim)
        self.null_attn_bias = nn.Parameter(torch.randn(HEADS))
        self.null_kv = nn.Parameter(torch.randn(2, HEAD_DIM))
        self.to_q = nn.Linear(dim, HEADS * HEAD_DIM, bias=False)
        self.to_kv = nn.Linear(dim, 2 * HEAD_DIM, bias=False)
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(HEAD_DIM)), nn.Parameter(torch.ones(HEAD_DIM))
        self.to_out = nn.Sequential(nn.Linear(HEADS * HEAD_DIM, dim, bias=False), LayerNorm(dim))

    def forward(self, x: torch.Tensor, context: Any = None, mask: Any = None, attn_bias: Any = None) -> torch.Tensor:
        batch, n = x.shape[:2]
        x = self.norm(x)
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = (
            torch.cat((null.expand(batch, 1, -1), t), dim=1)
            for null, t in zip(self.null_kv, self.to_kv(x).chunk(2, dim=-1), strict=True)
        )
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        scores = torch.einsum("bhid,bjd->bhij", q, k) * self.scale
        if self.rel_pos_bias is not None:
            bias = self.rel_pos_bias(n, device=x.device, dtype=q.dtype)
            scores = scores + torch.cat((self.null_attn_bias[:, None, None].expand(-1, n, 1), bias), dim=-1)
        if self.causal:
            later = torch.ones(n, n + 1, dtype=torch.bool, device=x.device).triu(2)
            scores = scores.masked_fill(later, -torch.finfo(scores.dtype).max)
        y = torch.einsum("bhij,bjd->bhid", scores.softmax(dim=-1), v)
        return self.to_out(rearrange(y, "b h n d -> b n (h d)"))


class Block(nn.Module):
    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.norm, self.activation, self.project = ChanRMSNorm(dim), nn.SiLU(), Conv3d(dim, dim_out)

    def forward(self, x: torch.Tensor, scale_shift: Any = None, ignore_time: bool = False) -> torch.Tensor:
        x = self.norm(x)
        if scale_shift is not None:
            x = x * (scale_shift[0] + 1) + scale_shift[1]
        return self.project(self.activation(x), ignore_time=ignore_time)


class Unet3D(nn.Module):
    """One level: two blocks, the temporal positions and the temporal attention."""

    def __init__(self, dim: int = 8, channels: int = 3, causal: bool = True) -> None:
        super().__init__()
        self.init_conv = Conv3d(channels, dim)
        self.init_block = Block(dim, dim)
        pads = (0, 0, 0, 0, 2, 0) if causal else (0, 0, 0, 0, 1, 1)
        self.init_temporal_peg = Residual(nn.Sequential(Pad(pads), nn.Conv3d(dim, dim, (3, 1, 1), groups=dim)))
        self.init_temporal_attn = RearrangeTimeCentric(Residual(Attention(dim, causal=causal, rel_pos_bias=True)))
        self.to_scale_shift = nn.Linear(1, 2 * dim)
        self.final_block = Block(dim, dim)
        self.final_conv = Conv3d(dim, channels)

    def forward(self, x: torch.Tensor, time: torch.Tensor, ignore_time: bool = False) -> torch.Tensor:
        x = self.init_block(self.init_conv(x, ignore_time=ignore_time), ignore_time=ignore_time)
        if not ignore_time:
            x = self.init_temporal_attn(self.init_temporal_peg(x))
        modulation = self.to_scale_shift(time.to(x.dtype)[:, None] / 1000)[..., None, None, None].chunk(2, dim=1)
        x = self.final_block(x, scale_shift=modulation, ignore_time=ignore_time)
        return self.final_conv(x, ignore_time=ignore_time)
