"""The block that a VideoUNet repeats: residual convolutions, then attention over space, text and time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fastvdiff.nn import (
    CrossAttention,
    CrossFrameAttention,
    FeedForward,
    ResnetBlock3d,
    SpatialAttention,
    TemporalAttention,
)
from fastvdiff.nn.tokens import from_tokens, to_tokens

from .config import VideoUNetConfig


class Conditions(NamedTuple):
    """What every block is told besides its input."""

    time: torch.Tensor  # (B, 4 * base_channels)
    text: torch.Tensor | None  # (B, L, cross_attention_dim)
    text_mask: torch.Tensor | None  # (B, L) bool
    positions: dict[int, dict[str, Any]]  # width -> position arguments of temporal attention


class ResidualFeedForward(nn.Module):
    """`x + ff(norm(x))` over the channels of a video."""

    def __init__(self, channels: int, mult: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, mult=mult, zero_init=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, C, T, H, W)."""
        return x + from_tokens(self.ff(self.norm(to_tokens(x))), *x.shape[3:])


class VideoBlock(nn.Module):
    """Residual block, then the attentions that its level has: spatial, text, temporal; then feed-forward.

    Args:
        config: the network's.
        in_channels: channels of the input, the skip connection's included.
        level: gives the output channels and the attentions.
    """

    def __init__(self, config: VideoUNetConfig, in_channels: int, level: int) -> None:
        super().__init__()
        channels = config.level_channels[level]
        self.channels = channels
        heads, dim = config.heads_of(channels)
        self.resnet = ResnetBlock3d(
            in_channels, channels, config.dropout, 4 * config.base_channels, config.norm_groups, config.norm_eps,
            time_embedding_norm="default" if config.time_conditioning == "add" else "scale_shift",
            conv=config.conv, zero_init=True,
        )  # fmt: skip
        self.spatial = self.text = self.temporal = self.feed_forward = None
        if level in config.spatial_attention_levels:
            attention = CrossFrameAttention if config.cross_frame_attention else SpatialAttention
            self.spatial = attention(channels, None, heads, dim)
        if level in config.cross_attention_levels and config.cross_attention_dim is not None:
            self.text = CrossAttention(channels, config.cross_attention_dim, heads, dim)
        if level in config.temporal_attention_levels:
            self.temporal = TemporalAttention(channels, heads, dim)
        if config.feed_forward_mult and (self.spatial or self.text or self.temporal):
            self.feed_forward = ResidualFeedForward(channels, config.feed_forward_mult)

    def forward(self, x: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """(B, C_in, T, H, W) -> (B, C, T, H, W)."""
        x = self.resnet(x, conditions.time)
        if self.spatial is not None:
            x = self.spatial(x)
        if self.text is not None:
            x = self.text(x, conditions.text, conditions.text_mask)
        if self.temporal is not None:
            x = self.temporal(x, **conditions.positions[self.channels])
        if self.feed_forward is not None:
            x = self.feed_forward(x)
        return x
