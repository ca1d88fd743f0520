"""What every position of a clip is expected to hold, from its place, the diffusion time and the text alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

FRAMES = 16  # frame p has the coordinate 2 p / FRAMES - 1: a clip of so many frames spans [-1, 1], as its sides do
HARMONICS = 3
FEATURES = 3 * (1 + 2 * HARMONICS)


def coordinate_features(height: int, width: int, positions: torch.Tensor) -> torch.Tensor:
    """Row, column and frame in [-1, 1], each with sines and cosines of half a turn, one turn and one and a half.

    positions: (T,) of the frames, in frames. Returns (T, height, width, FEATURES) float32; rows and columns are at
    their centres, whatever the size.
    """
    rows, columns = (
        (torch.arange(size, device=positions.device, dtype=torch.float32) * 2 + 1) / size - 1
        for size in (height, width)
    )
    times = positions.to(torch.float32) * (2 / FRAMES) - 1
    axes = (rows[None, :, None], columns[None, None, :], times[:, None, None])
    places = torch.stack([axis.expand(len(times), height, width) for axis in axes], dim=-1)
    angles = places.unsqueeze(-1) * (math.pi / 2 * torch.arange(1, HARMONICS + 1, device=positions.device))
    return torch.cat([places, angles.sin().flatten(-2), angles.cos().flatten(-2)], dim=-1)


class CoordinateField(nn.Module):
    """A network from coordinates to channels, whose hidden layer the time embedding scales and shifts.

    Where the noise hides everything, the best prediction is a blurred picture that only the text decides: here it has a
    way of its own to the first block, past the noise. The result starts at 0.

    Args:
        channels: of the result.
        embedding: channels of the time embedding, the pooled text included.
        hidden: width of the hidden layer.

    Source: Stanley, "Compositional pattern producing networks", 2007; the modulation is that of Perez et al., "FiLM",
    arXiv:1709.07871.
    """

    def __init__(self, channels: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(FEATURES, hidden)
        self.modulation = nn.Linear(embedding, 2 * hidden)
        self.linear_out = nn.Linear(hidden, channels)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W), (B, embedding) and the frames' positions (T,) -> x with the field added."""
        features = coordinate_features(x.shape[3], x.shape[4], positions).to(x.dtype)
        scale, shift = self.modulation(F.silu(embedding))[:, None, None, None].chunk(2, dim=-1)
        hidden = F.silu(self.linear_in(features) * (1 + scale) + shift)
        return x + self.linear_out(hidden).movedim(-1, 1)
