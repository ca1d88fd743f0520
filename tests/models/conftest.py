"""Fixtures of the model tests: a small network of every kind, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastvdiff.models import VideoUNet, VideoUNetConfig

SMALL = {
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "temporal_attention_levels": (0, 1),
    "spatial_attention_levels": (1,),
    "cross_attention_levels": (1,),
    "cross_attention_dim": 6,
    "num_heads": 2,
    "head_dim": 4,
    "norm_groups": 4,
}


@pytest.fixture
def small() -> Callable[..., VideoUNet]:
    """Builds a small VideoUNet; every parameter that starts at zero gets random values, so that all of them count."""

    def build(**overrides: Any) -> VideoUNet:
        model = VideoUNet(VideoUNetConfig(**{**SMALL, **overrides}))
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        return model

    return build


@pytest.fixture
def call() -> Callable[..., dict[str, Any]]:
    """Arguments of one evaluation of a small network."""

    def arguments(batch: int = 2, frames: int = 4, height: int = 8, width: int = 8, text: int = 5) -> dict[str, Any]:
        return {
            "sample": torch.randn(batch, 3, frames, height, width),
            "timestep": torch.randint(0, 1000, (batch,)),
            "encoder_hidden_states": torch.randn(batch, text, SMALL["cross_attention_dim"]),
        }

    return arguments
