"""Drawn calls of temporal_attention, for every implementation's tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from .temporal_attention_inputs import LAYOUTS, NARROW, rotary_tables


@st.composite
def calls(
    draw: st.DrawFn,
    device: str = "cpu",
    frames: tuple[int, ...] = (1, 2, 7, 16, 25),
    keys: tuple[int, ...] = (1, 5, 18),
    positions: tuple[int, ...] = (1, 3, 9, 16, 21, 33),
    limit: int = 150_000,
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any], torch.dtype]:
    """q, k, v, options and dtype of a call: sizes, layouts and features in any combination.

    Past `limit` elements in a tensor there is one sample, with no more than two heads.
    """
    dtype = draw(st.sampled_from(NARROW))
    length = draw(st.sampled_from(frames))
    others = draw(st.sampled_from((length, length, *keys)))
    batch, heads = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 5)))
    width = draw(st.sampled_from(positions))
    dim = draw(st.sampled_from((8, 13, 16, 32, 40, 64, 80, 160)))
    if batch * heads * width * dim * max(length, others) > limit:
        batch, heads = 1, min(heads, 2)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    gradients = draw(st.booleans())

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def big(rows: int) -> torch.Tensor:
        layout = draw(st.sampled_from(LAYOUTS))
        return layout((batch, rows, width, heads, dim), normal).requires_grad_(gradients)

    options: dict[str, Any] = {"is_causal": draw(st.booleans()), "scale": draw(st.sampled_from((None, 0.3, 1.0)))}
    if draw(st.booleans()):
        bias = torch.randn(heads, length, others, generator=generator).to(device)
        wide = draw(st.booleans())
        options["attn_bias"] = (bias if wide else bias.to(dtype)).requires_grad_(gradients and draw(st.booleans()))
    mask_shape = draw(st.sampled_from((None, (batch, others), (batch, length, others))))
    if mask_shape is not None:
        forbidden = draw(st.sampled_from((0.2, 0.8)))
        options["attn_mask"] = torch.rand(mask_shape, generator=generator).to(device) > forbidden
    if draw(st.booleans()):
        options["k_offset"] = draw(st.sampled_from((0, 3)))
        pairs = draw(st.integers(0, dim // 2))
        rows = max(length, others + options["k_offset"]) + draw(st.integers(0, 2))
        options["rotary"] = rotary_tables(rows, pairs, device)
        options["rotary_style"] = draw(st.sampled_from(("interleaved", "half")))
    return (big(length), big(others), big(others)), options, dtype
