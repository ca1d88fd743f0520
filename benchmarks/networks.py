"""What is timed of a whole network, on any device: its forward, or the forward and backward of a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import fastvdiff

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def output(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The network's sample."""
    result = model(**inputs)
    return result[0] if isinstance(result, tuple) else result


def step(model: nn.Module, inputs: Mapping[str, Any], training: bool) -> Callable[[], Any]:
    """A forward without a gradient, or one with its backward, whose gradients go again: a step's memory is its own."""
    if not training:

        def forward() -> Any:
            with torch.no_grad():
                return output(model, inputs)

        return forward

    def forward_and_backward() -> None:
        output(model, inputs).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return forward_and_backward


def on_reference(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` with every op on plain PyTorch."""

    def run() -> Any:
        with fastvdiff.use_impl("reference"):
            return call()

    return run


def leave_no_zeros(model: nn.Module, std: float) -> None:
    """Draw the parameters that start as zeros, behind which nothing of a block would be seen."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std) if not parameter.any() else None


def in_channels_last(model: nn.Module) -> nn.Module:
    """A copy whose convolutions have their weights in channels_last, 2-D and 3-D."""
    last = copy.deepcopy(model)
    for parameter in last.parameters():
        if parameter.dim() in _CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=_CHANNELS_LAST[parameter.dim()])
    return last
