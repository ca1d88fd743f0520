"""GroupNorm and SiLU where they stand side by side in a Sequential, of any library; Conv3d there too."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fastvdiff import ops
from fastvdiff.swap.frames import for_batch
from fastvdiff.swap.target import UNRELATED, Target, group_norm, kernel_runs, register
from fastvdiff.swap.target import silu as is_silu


def norm_silu(
    x: torch.Tensor, norm: nn.GroupNorm, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None,
    silu: bool = True, stats: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """SiLU(norm(x) * (1 + scale) + shift), `norm` being what `group_norm` knows; scale, shift (B or 1, C).

    `stats`: those of x, where a convolution has left them.
    """
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, scale=for_batch(scale, x),
                               shift=for_batch(shift, x), silu=silu, stats=stats)  # fmt: skip


def fuses(x: torch.Tensor, norm: Any) -> bool:
    """Whether `norm`, followed by SiLU, has a kernel on x."""
    return group_norm(norm) and x.dim() <= 5 and kernel_runs("group_norm_silu", x, norm.weight, norm.bias)


def _check(module: nn.Module) -> str | None:
    layers = tuple(module)
    if any(group_norm(a) and is_silu(b) for a, b in pairwise(layers)):
        return None
    return UNRELATED


def _forward(module: nn.Sequential, eager: Any, input: torch.Tensor) -> torch.Tensor:
    layers = tuple(module)
    x, i = input, 0
    while i < len(layers):
        if i + 1 < len(layers) and is_silu(layers[i + 1]) and fuses(x, layers[i]):
            x = norm_silu(x, layers[i])
            i += 2
        else:
            x = layers[i](x)
            i += 1
    return x


register(Target(("Sequential",), "GroupNorm and SiLU in one pass", _check, _forward, calls=True))
