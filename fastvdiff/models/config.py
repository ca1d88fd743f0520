"""What a VideoUNet is made of, as plain values that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

from fastvdiff import checks
from fastvdiff.nn.conv3d import KINDS as CONV_KINDS

_POSITIONS = ("sinusoidal", "rotary", "relative", "rotary+relative", None)
_TIME = ("scale_shift", "add")
_LEVELS = ("temporal_attention_levels", "spatial_attention_levels", "cross_attention_levels")


@dataclass(frozen=True, kw_only=True)
class VideoUNetConfig:
    """Sizes and kinds of a `VideoUNet`; level 0 has the full resolution, each next level half of it.

    Args:
        in_channels, out_channels: channels of the sample and of the prediction.
        conditioning_channels: channels that `forward(conditioning=...)` adds to the sample's (earlier frames, a
            low-resolution clip, masks).
        base_channels: channels of level 0.
        channel_multipliers: channels of each level, in units of base_channels.
        blocks_per_level: residual blocks of each level, on the way down and on the way up.
        patch_size: squares of this many pixels become channels before the first convolution and pixels after the last.
        patch_frames: the squares go through this many frames, and the network runs on T / patch_frames of them.
        stem_kernel_size: height and width of the first convolution, odd.
        coordinates: a small network from row, column and frame, modulated by time and text, adds to the first
            convolution's result: what is expected where need not be found out from padding and noise.
        conv: "spatial" (1,3,3), "factorized" (1,3,3)+(3,1,1) or "full" (3,3,3) in the residual blocks.
        temporal_attention_levels, spatial_attention_levels, cross_attention_levels: levels whose blocks attend over
            frames, over positions, and to the text; the middle block follows the last level.
        cross_attention_dim: width of the text, or None for a model without text (no level attends to it then).
        pooled_text: the mean of the text's tokens, projected, joins the time embedding and so every residual
            block, in a model with text.
        cross_frame_attention: spatial attention looks at the first and the previous frame instead of its own.
        num_heads, head_dim: both; or one, and the other follows from the level's channels.
        temporal_position: "sinusoidal" (a frame embedding), "rotary", "relative" (T5 buckets, shared by all layers),
            "rotary+relative" or None.
        relative_buckets, relative_max_distance: of the relative bias.
        feed_forward_mult: hidden width of the feed-forward layer after attention, in units of the level's channels;
            0 for none.
        time_conditioning: "scale_shift" modulates the second norm of a residual block, "add" adds to its input.
        norm_groups, norm_eps: of every GroupNorm.
        dropout: inside the residual blocks.
        gradient_checkpointing: recompute each block, temporal attention included, in the backward pass of training.

    Raises:
        ValueError, TypeError: a value is wrong; the message names the field.
    """

    in_channels: int = 3
    out_channels: int = 3
    conditioning_channels: int = 0
    base_channels: int = 64
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 8)
    blocks_per_level: int = 2
    patch_size: int = 1
    patch_frames: int = 1
    stem_kernel_size: int = 3
    coordinates: bool = False
    conv: str = "spatial"
    temporal_attention_levels: tuple[int, ...] = (0, 1, 2, 3)
    spatial_attention_levels: tuple[int, ...] = (2, 3)
    cross_attention_levels: tuple[int, ...] = (2, 3)
    cross_attention_dim: int | None = None
    pooled_text: bool = False
    cross_frame_attention: bool = False
    num_heads: int | None = 8
    head_dim: int | None = 32
    temporal_position: str | None = "sinusoidal"
    relative_buckets: int = 32
    relative_max_distance: int = 32
    feed_forward_mult: int = 0
    time_conditioning: str = "scale_shift"
    norm_groups: int = 8
    norm_eps: float = 1e-5
    dropout: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("channel_multipliers", *_LEVELS):
            self._check_ints(name)
        self._check_numbers()
        for name, allowed in (("conv", CONV_KINDS), ("temporal_position", _POSITIONS), ("time_conditioning", _TIME)):
            if getattr(self, name) not in allowed:
                self._fail(name, f"one of {', '.join(map(repr, allowed))}")
        for name in ("coordinates", "pooled_text", "cross_frame_attention", "gradient_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                self._fail(name, "True or False", TypeError)
        self._check_levels()
        for channels in self.level_channels:
            if channels % self.norm_groups:
                self._fail("norm_groups", f"a divisor of every level's channels {self.level_channels}")
            self.heads_of(channels)

    def _fail(self, name: str, expected: str, error: type[Exception] = ValueError) -> NoReturn:
        checks.fail("VideoUNetConfig", name, expected, repr(getattr(self, name)), error)

    def _check_ints(self, name: str) -> None:
        """The field is a list or tuple of ints; it becomes a tuple, whatever JSON made of it."""
        value = getattr(self, name)
        if not isinstance(value, (list, tuple)) or any(type(v) is not int for v in value):
            self._fail(name, "a tuple of ints", TypeError)
        object.__setattr__(self, name, tuple(value))

    def _check_numbers(self) -> None:
        least = {
            "in_channels": 1, "out_channels": 1, "conditioning_channels": 0, "base_channels": 1, "blocks_per_level": 1,
            "patch_size": 1, "patch_frames": 1, "stem_kernel_size": 1, "cross_attention_dim": 1, "num_heads": 1,
            "head_dim": 1, "relative_buckets": 4, "relative_max_distance": 1, "feed_forward_mult": 0, "norm_groups": 1,
        }  # fmt: skip
        optional = ("cross_attention_dim", "num_heads", "head_dim")
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if type(value) is not int:
                self._fail(name, "an int or None" if name in optional else "an int", TypeError)
            if value < minimum:
                self._fail(name, f"at least {minimum}")
        if self.stem_kernel_size % 2 == 0:
            self._fail("stem_kernel_size", "an odd number")
        if self.relative_buckets % 4:
            self._fail("relative_buckets", "a multiple of 4")
        if self.relative_max_distance <= self.relative_buckets // 4:
            self._fail("relative_max_distance", f"more than {self.relative_buckets // 4}, a quarter of the buckets")
        for name, below in (("norm_eps", float("inf")), ("dropout", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                self._fail(name, "a number", TypeError)
            if not 0 <= value < below:
                self._fail(name, f"at least 0 and below {below}")

    def _check_levels(self) -> None:
        multipliers = self.channel_multipliers
        if not multipliers or min(multipliers) < 1:
            self._fail("channel_multipliers", "at least one level, multipliers of 1 or more")
        for name in _LEVELS:
            levels = getattr(self, name)
            if len(set(levels)) != len(levels) or any(not 0 <= level < len(multipliers) for level in levels):
                self._fail(name, f"different levels from 0 to {len(multipliers) - 1}")
        if self.cross_attention_dim is not None and not self.cross_attention_levels:
            self._fail("cross_attention_levels", "at least one level, as cross_attention_dim is set")
        if self.cross_frame_attention and not self.spatial_attention_levels:
            self._fail("spatial_attention_levels", "at least one level, as cross_frame_attention is set")

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of every level."""
        return tuple(self.base_channels * m for m in self.channel_multipliers)

    def heads_of(self, channels: int) -> tuple[int, int]:
        """(heads, head dim) of attention on `channels` channels."""
        if self.num_heads is not None and self.head_dim is not None:
            return self.num_heads, self.head_dim
        if self.num_heads is None and self.head_dim is None:
            self._fail("num_heads", "an int, as head_dim is None")
        name = "head_dim" if self.num_heads is None else "num_heads"
        given = getattr(self, name)
        if channels % given:
            self._fail(name, f"a divisor of every level's channels {self.level_channels}")
        return (channels // given, given) if name == "head_dim" else (given, channels // given)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them: tuples become lists."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VideoUNetConfig:
        """The inverse of `to_dict`; a key that is no field raises ValueError and names the fields."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"VideoUNetConfig: unknown key{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))};"
                f" expected some of {', '.join(known)}"
            )
        return cls(**values)
