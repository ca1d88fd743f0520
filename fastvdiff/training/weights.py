"""A module's weights as tensors that safetensors can hold, and back, with every mismatch named."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's state by name, a tensor that several names share under its first name only."""
    seen: set[int] = set()
    weights = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor
    return weights


@torch.no_grad()
def load_weights(module: nn.Module, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Copy into the module what `weights_of` gave; ValueError names the first weights that do not fit."""
    mine = weights_of(module)
    wrong = [f"{name}: missing" for name in mine if name not in tensors]
    wrong += [f"{name}: not a weight of this model" for name in tensors if name not in mine]
    wrong += [
        f"{name}: expected shape {tuple(tensor.shape)}, got {tuple(tensors[name].shape)}"
        for name, tensor in mine.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{what}: {'; '.join(wrong[:3])}{more}")
    for name, tensor in mine.items():
        tensor.copy_(tensors[name])
