"""VideoUNetConfig: JSON and back, and an error for each wrong value."""

import json
from typing import Any

import pytest

from fastvdiff.models import PRESETS, VideoUNetConfig


@pytest.mark.parametrize("name", PRESETS)
def test_survives_json(name: str) -> None:
    config = PRESETS[name]
    again = VideoUNetConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert isinstance(again.channel_multipliers, tuple)


def test_unknown_keys_are_named() -> None:
    with pytest.raises(ValueError, match="VideoUNetConfig: unknown keys 'dims', 'width'; expected some of in_channels"):
        VideoUNetConfig.from_dict({"width": 3, "dims": 2})


def test_heads() -> None:
    assert VideoUNetConfig(num_heads=8, head_dim=32).heads_of(64) == (8, 32)
    assert VideoUNetConfig(num_heads=None, head_dim=16).heads_of(64) == (4, 16)
    assert VideoUNetConfig(num_heads=4, head_dim=None).heads_of(64) == (4, 16)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"conv": "3d"}, ValueError, "conv: expected one of 'spatial', 'factorized', 'full', got '3d'"),
        ({"temporal_position": "absolute"}, ValueError, "temporal_position: expected one of 'sinusoidal'"),
        ({"time_conditioning": "film"}, ValueError, "time_conditioning: expected one of 'scale_shift', 'add'"),
        ({"base_channels": 0}, ValueError, "base_channels: expected at least 1, got 0"),
        ({"base_channels": 64.0}, TypeError, "base_channels: expected an int, got 64.0"),
        ({"blocks_per_level": True}, TypeError, "blocks_per_level: expected an int, got True"),
        ({"norm_groups": 7}, ValueError, r"norm_groups: expected a divisor of every level's channels \(64, 128"),
        ({"num_heads": None, "head_dim": 48}, ValueError, "head_dim: expected a divisor of every level's channels"),
        ({"num_heads": 5, "head_dim": None}, ValueError, "num_heads: expected a divisor"),
        ({"num_heads": None, "head_dim": None}, ValueError, "num_heads: expected an int, as head_dim is None"),
        ({"channel_multipliers": ()}, ValueError, "channel_multipliers: expected at least one level"),
        ({"channel_multipliers": (1, 0)}, ValueError, "channel_multipliers: expected"),
        ({"channel_multipliers": "1248"}, TypeError, "channel_multipliers: expected a tuple of ints"),
        (
            {"channel_multipliers": (1, 2)},
            ValueError,
            "temporal_attention_levels: expected different levels from 0 to 1",
        ),
        ({"spatial_attention_levels": (1, 1)}, ValueError, "spatial_attention_levels: expected different levels"),
        (
            {"cross_attention_dim": 8, "cross_attention_levels": ()},
            ValueError,
            "cross_attention_levels: expected at lea",
        ),
        ({"cross_frame_attention": True, "spatial_attention_levels": ()}, ValueError, "spatial_attention_levels: exp"),
        ({"cross_frame_attention": 1}, TypeError, "cross_frame_attention: expected True or False, got 1"),
        ({"dropout": 1.0}, ValueError, "dropout: expected at least 0 and below 1.0, got 1.0"),
        ({"norm_eps": "small"}, TypeError, "norm_eps: expected a number, got 'small'"),
        ({"stem_kernel_size": 4}, ValueError, "stem_kernel_size: expected an odd number, got 4"),
        ({"relative_buckets": 30}, ValueError, "relative_buckets: expected a multiple of 4"),
        ({"relative_max_distance": 8}, ValueError, "relative_max_distance: expected more than 8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_values(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"VideoUNetConfig: {message}"):
        VideoUNetConfig(**values)
