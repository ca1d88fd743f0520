"""Inputs of temporal_attention_block, for every implementation's tests, and what the Triton kernels give for them."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastvdiff.ops import temporal_attention_block as block
from tests.closeness import hold

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")
WEIGHTS = ("q_weight", "k_weight", "v_weight", "out_weight")


def in_layout(layout: str, *shape: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """A normal (B, C, T, H, W) tensor with the strides that `layout` names."""
    batch, channels, frames, height, width = shape

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    if layout == "contiguous":
        return normal(*shape)
    if layout == "channels_last":
        return normal(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
    if layout == "sliced":
        return normal(batch, channels + 3, frames, height, width + 2)[:, 2:-1, :, :, 1:-1]
    return normal(height, channels, batch, width, frames).permute(2, 1, 4, 0, 3)


def parameters(
    channels: int, heads: int, dim: int, frames: int, dtype: torch.dtype = torch.float32,
    device: str = "cpu", *, gradients: bool = True, generator: torch.Generator | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Every parameter of the op by name, at sizes that keep scores near 1."""
    inner = heads * dim
    shapes = dict.fromkeys(WEIGHTS[:3], (inner, channels)) | {"out_weight": (channels, inner)}
    shapes |= dict.fromkeys(("q_bias", "k_bias", "v_bias"), (inner,))
    shapes |= dict.fromkeys(("out_bias", "norm_weight", "norm_bias"), (channels,))
    shapes |= {"frame_embedding": (frames, channels), "attn_bias": (heads, frames, frames)}
    found = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        value = value / math.sqrt(shape[1]) if name in WEIGHTS else value
        found[name] = value.to(device, dtype).requires_grad_(gradients)
    return found


def drawn(shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str = "channels_last") -> torch.Tensor:
    return in_layout(layout, *shape).to(device, dtype).requires_grad_()


def check(call: tuple[torch.Tensor, dict[str, Any], torch.dtype]) -> None:
    """Hold the Triton kernels to float64: x, options and dtype."""
    x, options, dtype = call
    y = hold(block, x, impl="triton", dtype=dtype, **options)
    assert y.dtype == dtype
    assert y.stride() == torch.empty_like(x).stride()


def results(x: torch.Tensor, heads: int, options: dict[str, Any]) -> list[torch.Tensor]:
    """The Triton kernels' result, and the gradients of x and of every parameter, none with a graph of autograd's."""
    y = block(x, heads=heads, impl="triton", **options)
    leaves = [x, *(t for t in options.values() if isinstance(t, torch.Tensor) and t.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]
