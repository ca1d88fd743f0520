"""Drawn calls of ddim_step, for every implementation's tests: shapes, layouts and options in any combination."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st

NARROW = (torch.float32, torch.bfloat16, torch.float16)
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def contiguous(t: torch.Tensor) -> torch.Tensor:
    return t


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.to(memory_format=torch.channels_last_3d) if t.dim() == 5 else t


def sliced(t: torch.Tensor) -> torch.Tensor:
    wider = torch.full((*t.shape[:-1], t.shape[-1] + 3), math.nan, dtype=t.dtype, device=t.device)
    wider[..., 1:-2] = t
    return wider[..., 1:-2]


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = (contiguous, channels_last, sliced, transposed)


@st.composite
def calls(draw: st.DrawFn, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any], torch.dtype]:
    """Arguments of a call, with its dtype; at most 7,560 elements."""
    dtype = draw(st.sampled_from(NARROW))
    batch, frames = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 7)))
    channels, height, width = draw(st.sampled_from((1, 3, 8))), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    video = draw(st.booleans())
    shape = (batch, channels, frames, height, width) if video else (batch, channels, height, width)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    gradients = draw(st.booleans())

    def big() -> torch.Tensor:
        t = torch.randn(shape, generator=generator).to(device, dtype)
        return draw(st.sampled_from(LAYOUTS))(t).requires_grad_(gradients)

    def alpha(low: float, high: float) -> Any:
        value = low + (high - low) * torch.rand(batch, generator=generator).to(device)
        return draw(st.sampled_from((float(value[0]), value[0], value)))

    options: dict[str, Any] = {
        "prediction_type": draw(st.sampled_from(PREDICTIONS)),
        "clip_sample": draw(st.sampled_from((None, 0.75, 1.5))),
        "use_clipped_model_output": draw(st.booleans()),
        "return_pred_original": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options["uncond_output"] = big()
        per_frame = torch.rand(batch, frames if video else 1, generator=generator).to(device) * 7
        options["guidance_scale"] = draw(
            st.sampled_from((7.5, per_frame[0, 0], per_frame[:1], per_frame[:, :1], per_frame))
        )
        if not gradients and math.prod(shape[1:]) > 1:
            options["guidance_rescale"] = draw(st.sampled_from((0.0, 0.7)))
    if not gradients:
        options["dynamic_threshold"] = draw(st.sampled_from((None, (0.9, 3.0), (0.995, 1.0))))
    options["eta"] = draw(st.sampled_from((0.0, 0.3, 1.0)))
    if options["eta"] > 0:
        if draw(st.booleans()):
            options["noise"] = big()
        else:
            options["noise_seed"] = torch.tensor([draw(st.integers(-(2**63), 2**63 - 1))], device=device)
    return (big(), big(), alpha(0.05, 0.6), alpha(0.65, 1.0)), options, dtype
