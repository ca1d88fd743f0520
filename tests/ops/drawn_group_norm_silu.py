"""Drawn calls of group_norm_silu, for every implementation's tests: layouts, parameters, options in any combination."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st

from fastvdiff.ops import group_norm_silu
from tests.closeness import hold

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (channels, groups) that `calls` does not draw: see there.
FEW_CHANNELS = ((1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 2), (5, 5), (6, 3), (7, 1))
LAYOUTS = ("contiguous", "channels_last", "sliced", "sliced_channels", "narrow_width", "transposed", "expanded")
ARGUMENTS = ("weight", "bias", "scale", "shift")


def in_layout(
    layout: str, *shape: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """A random tensor of `shape` whose strides are those of `layout`."""
    batch, channels, *space = shape
    last = {3: None, 4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes).to(device, dtype)

    if layout == "sliced":
        return draw(batch, channels + 3, *space)[:, 2 : 2 + channels]
    if layout == "sliced_channels":
        return draw(batch, *space, channels + 5).movedim(-1, 1)[:, 1 : 1 + channels]
    if layout == "narrow_width":
        return draw(*shape[:-1], shape[-1] + 2)[..., 1:-1]
    if layout == "transposed":
        return draw(batch, channels, *reversed(space)).permute(0, 1, *range(len(shape) - 1, 1, -1))
    if layout == "expanded":
        return draw(1, channels, *space).expand(shape)
    x = draw(*shape)
    if layout == "channels_last":
        return x.to(memory_format=last) if last is not None else x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


def parameters(x: torch.Tensor, form: str = "plain", dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """weight, bias and, by `form`, scale and shift; all of them ask for gradients."""
    batch, channels, frames = x.shape[:3]
    shapes = {"weight": (channels,), "bias": (channels,)}
    per_sample, per_frame = (batch, channels), (batch, channels, frames)
    shapes |= {
        "plain": {},
        "sample": {"scale": per_sample, "shift": per_sample},
        "frame": {"scale": per_frame, "shift": per_frame},
        "mixed": {"scale": per_frame, "shift": per_sample},
        "mixed_other": {"scale": per_sample, "shift": per_frame},
        "scale_alone": {"scale": per_sample},
        "shift_alone": {"shift": per_frame if x.dim() == 5 else per_sample},
    }[form]
    return {n: torch.randn(s).to(x.device, dtype or x.dtype).requires_grad_() for n, s in shapes.items()}


def check(x: torch.Tensor, groups: int, impl: str = "cpu", **arguments: Any) -> torch.Tensor:
    """Output and every gradient within the project's tolerances, in x's memory format."""
    # A cotangent drawn like x itself would leave a gradient of x that is rounding alone.
    y = hold(group_norm_silu, x.requires_grad_(), groups, impl=impl, dtype=x.dtype, seed=2**17, **arguments)
    assert y.stride() == torch.empty_like(x).stride()
    assert y.dtype == x.dtype
    return y


@st.composite
def calls(
    draw: st.DrawFn, batch: int = 3, extent: int = 9, device: str = "cpu"
) -> tuple[torch.Tensor, int, dict[str, Any]]:
    """(x, groups, the other arguments); at most `batch` samples, `extent` positions a dimension and 54 channels."""
    groups = draw(st.integers(1, 6))
    space = draw(st.lists(st.integers(1, extent), min_size=1, max_size=3))
    # With a handful of channels a parameter's gradient can cancel to rounding alone: FEW_CHANNELS have fixed inputs.
    width = max(draw(st.integers(1, 9)), math.ceil(8 / groups))
    shape = (draw(st.integers(1, batch)), groups * width, *space)
    if math.prod(shape[1:]) < 16 * groups:
        # With a handful of values dx is what two projections leave of dz: all rounding, in eager as here.
        shape = (*shape[:-1], 16)
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    x = in_layout(draw(st.sampled_from(LAYOUTS)), *shape, dtype=dtype, device=device)
    forms = ["plain", "sample", "scale_alone", "shift_alone"] + (["frame", "mixed"] if len(shape) == 5 else [])
    given_ones = parameters(x, draw(st.sampled_from(forms)))
    absent = draw(st.sets(st.sampled_from(("weight", "bias"))))
    given_ones = {name: p for name, p in given_ones.items() if name not in absent}
    return x, groups, {"silu": draw(st.booleans()), "eps": draw(st.sampled_from((1e-5, 1e-3))), **given_ones}
