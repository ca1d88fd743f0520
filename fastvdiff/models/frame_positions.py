"""Where the frames are: the encodings that all temporal attention layers of a network share."""

from __future__ import annotations

import torch
from torch import nn

from fastvdiff.nn import FrameEmbedding, RelativePositionBias, rotary_table

from .config import VideoUNetConfig

# Dimensions of a head that turn, at most: as in the original video diffusion U-Net.
_MAX_ROTARY_DIM = 32


class FramePositions(nn.Module):
    """Frame positions -> the position arguments of `nn.TemporalAttention`, for each width that attends over frames.

    Each encoding is made once in a forward pass, whatever the number of layers; the relative bias has one table for
    each number of heads.
    """

    def __init__(self, config: VideoUNetConfig) -> None:
        super().__init__()
        kind = config.temporal_position or ""
        widths = {config.level_channels[level] for level in config.temporal_attention_levels}
        self.heads = {channels: config.heads_of(channels) for channels in sorted(widths)}
        self.rotary = "rotary" in kind
        self.embeddings = nn.ModuleDict(
            {str(channels): FrameEmbedding(channels) for channels in self.heads} if kind == "sinusoidal" else {}
        )
        counts = sorted({heads for heads, _ in self.heads.values()}) if "relative" in kind else ()
        self.biases = nn.ModuleDict(
            {
                str(heads): RelativePositionBias(heads, config.relative_buckets, config.relative_max_distance)
                for heads in counts
            }
        )

    def forward(self, positions: torch.Tensor) -> dict[int, dict[str, torch.Tensor | tuple[torch.Tensor, ...]]]:
        """(T,) positions -> for each width, keyword arguments of `nn.TemporalAttention`."""
        biases = {int(heads): bias(positions) for heads, bias in self.biases.items()}
        dims = {min(_MAX_ROTARY_DIM, dim) // 2 * 2 for _, dim in self.heads.values()} if self.rotary else ()
        tables = {dim: rotary_table(positions, dim) for dim in dims}
        encodings = {}
        for channels, (heads, dim) in self.heads.items():
            encoding = {}
            if self.embeddings:
                encoding["frame_embedding"] = self.embeddings[str(channels)](positions)
            if tables:
                encoding["rotary"] = tables[min(_MAX_ROTARY_DIM, dim) // 2 * 2]
            if biases:
                encoding["attn_bias"] = biases[heads]
            encodings[channels] = encoding
        return encodings
