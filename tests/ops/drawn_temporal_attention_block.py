"""Drawn calls of temporal_attention_block, for every implementation's tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from .temporal_attention_block_inputs import LAYOUTS, WEIGHTS, in_layout, parameters
from .temporal_attention_inputs import NARROW, rotary_tables


@st.composite
def calls(
    draw: st.DrawFn, device: str = "cpu", frames: tuple[int, ...] = (1, 2, 7, 16, 25), limit: int = 50_000
) -> tuple[torch.Tensor, dict[str, Any], torch.dtype]:
    """x, options and dtype of a call: sizes, layouts and features in any combination.

    Past `limit` elements in x there is one sample, of one row of positions.
    """
    dtype, length = draw(st.sampled_from(NARROW)), draw(st.sampled_from(frames))
    heads, dim = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((4, 7, 16, 20)))
    channels = draw(st.sampled_from((3, 8, 17, 40)))
    batch, height = draw(st.integers(1, 2)), draw(st.sampled_from((1, 3, 4)))
    width = draw(st.sampled_from((1, 4, 7, 9)))
    if batch * height * width * channels * length > limit:
        batch = height = 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    gradients = draw(st.sampled_from((True, True, False)))
    x = in_layout(draw(st.sampled_from(LAYOUTS)), batch, channels, length, height, width, generator=generator)
    x = x.to(device, dtype).requires_grad_(gradients)
    wide = torch.float32 if draw(st.booleans()) else dtype
    options = parameters(channels, heads, dim, length, wide, device, gradients=gradients, generator=generator)
    norm = draw(st.sampled_from(("layer_norm", "layer_norm", "rms_norm", None)))
    for name in [name for name in options if name not in WEIGHTS]:
        refused = (norm is None and name.startswith("norm_")) or (norm == "rms_norm" and name == "norm_bias")
        if refused or draw(st.booleans()):
            del options[name]
    options |= {
        "heads": heads, "norm": norm, "eps": draw(st.sampled_from((1e-5, 1e-2))),
        "is_causal": draw(st.booleans()), "residual": draw(st.booleans()), "scale": draw(st.sampled_from((None, 0.3))),
    }  # fmt: skip
    mask_shape = draw(st.sampled_from((None, (batch, length), (batch, length, length))))
    if mask_shape is not None:
        mask = torch.rand(mask_shape, generator=generator) > draw(st.sampled_from((0.2, 0.8)))
        options["attn_mask"] = mask.to(device)
    if draw(st.booleans()):
        options["rotary"] = rotary_tables(length + draw(st.integers(0, 2)), draw(st.integers(1, dim // 2)), device)
        options["rotary_style"] = draw(st.sampled_from(("interleaved", "half")))
    return x, options, dtype
