"""Inputs of temporal_attention, for every implementation's tests, and what the Triton kernels give for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastvdiff.ops import temporal_attention

NARROW = (torch.float32, torch.bfloat16, torch.float16)
Shape = tuple[int, int, int, int, int]


def frames_first(shape: Shape, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """(B, T, S, heads, D) as it is spelled: channels_last_3d's memory."""
    return draw(shape)


def channels_first(shape: Shape, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """A view of a contiguous (B, heads * D, T, S) video."""
    batch, frames, positions, heads, dim = shape
    return draw((batch, heads, dim, frames, positions)).permute(0, 3, 4, 1, 2)


def fused_frames_first(shape: Shape, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """A third of a fused qkv projection in channels_last_3d."""
    return draw((*shape[:3], 3, *shape[3:]))[:, :, :, 1]


def fused_channels_first(shape: Shape, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """A third of a fused qkv projection of a contiguous video."""
    batch, frames, positions, heads, dim = shape
    return draw((batch, 3, heads, dim, frames, positions))[:, 2].permute(0, 3, 4, 1, 2)


def apart(shape: Shape, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Neither positions nor dims are neighbours in memory."""
    batch, frames, positions, heads, dim = shape
    return draw((heads, batch, dim, positions, 2 * frames))[..., 1::2].permute(1, 4, 3, 0, 2)


def repeated(shape: Shape, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """One frame of every sample, stride 0 over the frames."""
    return draw((shape[0], 1, *shape[2:])).expand(shape)


LAYOUTS = (frames_first, channels_first, fused_frames_first, fused_channels_first, apart, repeated)


def rotary_tables(rows: int, pairs: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(rows)[:, None] * 100.0 ** (-torch.arange(pairs) / max(pairs, 1))
    return angles.cos().to(device), angles.sin().to(device)


def drawn(shape: Shape, device: str, dtype: torch.dtype, layout: Any = frames_first) -> torch.Tensor:
    return layout(shape, lambda sizes: torch.randn(sizes, device=device).to(dtype)).requires_grad_()


def results(leaves: tuple[torch.Tensor, ...], grad: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    """The Triton kernels' result, and the gradients of `leaves`: q, k, v and, where there is one, attn_bias."""
    q, k, v, *bias = leaves
    y = temporal_attention(q, k, v, attn_bias=bias[0] if bias else None, impl="triton", **options)
    return y, *torch.autograd.grad(y, leaves, grad)
