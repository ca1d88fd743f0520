"""How close a kernel has to be: its error against float64, next to what the eager expression in the same dtype loses.

err = ||y - oracle|| / ||oracle||, the oracle being the reference on inputs upcast to float64. A kernel passes with
err <= FORWARD_RATIO * err(eager) + FLOORS[dtype]; a gradient with GRADIENT_RATIO.
"""

from __future__ import annotations

import torch

FLOORS = {torch.float32: 2e-6, torch.float16: 3e-4, torch.bfloat16: 2e-3, torch.float64: 1e-12}
# Float32 multiplied as tf32: each factor is rounded to 11 bits, so a product is wrong by less than 2^-11 (rms), and a
# sum of products by no larger a share.
TF32_FLOOR = 2.0**-11
FORWARD_RATIO = 1.1
GRADIENT_RATIO = 1.5
# A gradient that is exactly zero in theory (q and k at T = 1) is measured against the call's largest one.
GRADIENT_SCALE = 0.01


def relative_error(y: torch.Tensor, oracle: torch.Tensor, least_scale: float = 0.0) -> float:
    """||y - oracle|| over ||oracle|| (at least `least_scale`), in float64; 0 for two empty or all-zero tensors."""
    y, oracle = y.detach().double(), oracle.detach().double()
    difference = float((y - oracle).norm())
    scale = max(float(oracle.norm()), least_scale)
    return difference / scale if scale else difference


def limit(baseline_error: float, dtype: torch.dtype, ratio: float = FORWARD_RATIO, *, tf32: bool = False) -> float:
    """The largest relative error that passes beside a baseline that loses `baseline_error` in `dtype`."""
    floor = TF32_FLOOR if tf32 and dtype == torch.float32 else FLOORS[dtype]
    return ratio * baseline_error + floor
