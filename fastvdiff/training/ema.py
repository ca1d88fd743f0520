"""The averaged weights: what a diffusion model is sampled with."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn


class ExponentialAverage:
    """A copy of some modules whose weights follow theirs slowly: average += (1 - decay) * (weight - average).

    The decay warms up as (1 + n) / (10 + n) over the updates n, so that the random start is soon forgotten. The copies
    in `modules` are ordinary modules in eval mode, to be sampled from or saved as they are.

    modules: by name; their parameters are averaged, their buffers copied. decay: in [0, 1).
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.modules = {name: copy.deepcopy(module).eval().requires_grad_(False) for name, module in modules.items()}

    def decay_at(self, update: int) -> float:
        """The decay of update number `update`, counted from 0."""
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def update(self, modules: Mapping[str, nn.Module], update: int) -> None:
        """Move the averages toward the modules' present weights."""
        weight = 1 - self.decay_at(update)
        for name, average in self.modules.items():
            torch._foreach_lerp_(list(average.parameters()), list(modules[name].parameters()), weight)
            for mine, theirs in zip(average.buffers(), modules[name].buffers(), strict=True):
                mine.copy_(theirs)
