"""torch's own Conv3d, in any module: where torch takes a slow path for it on a CPU, through another view."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvdiff import ops
from fastvdiff.ops.registration import autocast_dtype
from fastvdiff.reference.conv3d import beats_torch
from fastvdiff.swap.target import UNRELATED, Target, register

_MODES = ("zeros", "replicate")


def _check(conv: nn.Module) -> str | None:
    if not isinstance(conv, nn.Conv3d):
        return UNRELATED
    if type(conv)._conv_forward is not nn.Conv3d._conv_forward:
        return f"{type(conv).__name__} convolves in a way of its own"
    if conv.padding_mode not in _MODES:
        return f"padding_mode {conv.padding_mode!r}, which is none of {', '.join(_MODES)}"
    if all(k == 1 for k in conv.kernel_size):
        return "a matrix product for torch too: there is nothing to gain"
    return None


def _forward(conv: nn.Module, eager: Any, input: torch.Tensor) -> torch.Tensor:
    known = input.dim() == 5 and not torch.compiler.is_compiling()  # a compiler chooses its own view
    if not known or not beats_torch(input, autocast_dtype(input), conv.weight, conv.groups):
        return eager(conv, input)
    return ops.conv3d(input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
                      padding_mode=conv.padding_mode)  # fmt: skip


register(Target(("Conv3d",), "through another view where torch's is slow (CPU)", _check, _forward))
