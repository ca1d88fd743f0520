"""torch's own Conv3d, in any module: by a kernel, or through another view where torch's own is slow on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvdiff import dispatch, ops
from fastvdiff.ops.conv3d_facts import options_of
from fastvdiff.ops.registration import autocast_dtype
from fastvdiff.reference.conv3d import beats_torch, output_sizes, paddings
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


def _kernel_wins(conv: nn.Conv3d, x: torch.Tensor) -> bool:
    """Whether a kernel of ours would run it."""
    sides = paddings(conv.padding, conv.kernel_size, conv.dilation)
    out = output_sizes(x.shape[2:], conv.kernel_size, conv.stride, sides, conv.dilation)
    options = options_of(x.shape[0], conv.weight, conv.stride, conv.dilation, conv.groups, out, sums=False,
                         repeats=conv.padding_mode == "replicate")  # fmt: skip
    recorded = dispatch.needs_grad(x, conv.weight, conv.bias)
    facts = dispatch.Facts(x.device.type, autocast_dtype(x), tuple(x.shape), x.stride(), recorded, options)
    return dispatch.would_run("conv3d", facts) != "reference"


def _view_wins(conv: nn.Conv3d, x: torch.Tensor) -> bool:
    """Whether torch would be slow, which it is not where a compiler chooses its own view."""
    return not torch.compiler.is_compiling() and beats_torch(x, autocast_dtype(x), conv.weight, conv.groups)


def _forward(conv: nn.Module, eager: Any, input: torch.Tensor) -> torch.Tensor:
    if input.dim() != 5 or not (_kernel_wins(conv, input) or _view_wins(conv, input)):
        return eager(conv, input)
    return ops.conv3d(input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
                      padding_mode=conv.padding_mode)  # fmt: skip


_WHAT = "by a kernel (GPU: where it has won its race), or through another view where torch's is slow (CPU)"
register(Target(("Conv3d",), _WHAT, _check, _forward))
