"""A convolution of a normalised, modulated and activated input: the half of a residual block."""

from __future__ import annotations

from typing import Any

import torch

from .conv3d import conv3d
from .group_norm_silu import group_norm_silu


def norm_silu_conv3d(
    x: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
    **convolution: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """conv3d(group_norm_silu(x, ...), weight, bias, **convolution): what pads, pads the activation."""
    h = group_norm_silu(x, num_groups, norm_weight, norm_bias, eps, scale, shift, silu)
    return conv3d(h, weight, bias, **convolution)
