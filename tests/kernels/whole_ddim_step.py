"""A step with everything in it, for the tests of its Triton kernels."""

from __future__ import annotations

from typing import Any

import torch


def everything(device: str, dtype: torch.dtype, shape: tuple[int, ...] = (2, 4, 3, 8, 12)) -> dict[str, Any]:
    """Arguments that take a step through every kernel of the forward."""
    x, out, uncond = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    return {
        "sample": x, "model_output": out, "alpha_t": torch.full((shape[0],), 0.4, device=device), "alpha_prev": 0.7,
        "uncond_output": uncond, "guidance_scale": torch.rand(shape[0], shape[2], device=device) * 4,
        "guidance_rescale": 0.7, "dynamic_threshold": (0.9, 3.0), "eta": 1.0,
        "noise_seed": torch.tensor([5], device=device),
    }  # fmt: skip
