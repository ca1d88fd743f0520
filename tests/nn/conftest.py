"""Fixtures of the module tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture
def awake() -> Callable[[nn.Module], nn.Module]:
    """Gives every parameter that starts at zero (output projections, biases) small random values."""

    def wake(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        return module

    return wake
