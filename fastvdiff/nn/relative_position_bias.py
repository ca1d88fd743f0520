"""T5's bucketed relative position bias, between frames."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastvdiff import checks


class RelativePositionBias(nn.Module):
    """One learned number per head and bucket of the distance between two frames, added to the attention scores.

    Half of the buckets are for each direction; in each half the small distances have a bucket each, and larger ones
    share logarithmically wider buckets up to `max_distance`. One module serves all layers with the same heads.

    Args:
        heads: attention heads.
        num_buckets: buckets for both directions together; a multiple of 4.
        max_distance: distances from here on share the last bucket.

    Raises:
        ValueError: `num_buckets` is not a multiple of 4, or `max_distance` does not pass the exact buckets.

    Source: Raffel et al., "T5", arXiv:1910.10683, section 2.1; for frames as in Video Diffusion Models.
    """

    def __init__(self, heads: int, num_buckets: int = 32, max_distance: int = 32) -> None:
        super().__init__()
        if num_buckets < 4 or num_buckets % 4:
            checks.fail("RelativePositionBias", "num_buckets", "a multiple of 4", num_buckets)
        if max_distance <= num_buckets // 4:
            expected = f"more than the {num_buckets // 4} distances with a bucket each"
            checks.fail("RelativePositionBias", "max_distance", expected, max_distance)
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def buckets(self, distances: torch.Tensor) -> torch.Tensor:
        """The bucket of each signed distance (key minus query)."""
        half = self.num_buckets // 2
        exact = half // 2
        size = distances.abs()
        # Below `exact` the logarithm is not used; the clamp only keeps it finite.
        octaves = (size.float() / exact).clamp(min=1).log() / math.log(self.max_distance / exact)
        beyond = (exact + (octaves * (half - exact)).long()).clamp(max=half - 1)
        bucket = torch.where(size < exact, size.long(), beyond)
        return bucket + half * (distances > 0)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """(T,) frame positions -> (heads, T, T) bias for queries in rows and keys in columns."""
        distances = positions[None, :] - positions[:, None]
        return self.relative_attention_bias(self.buckets(distances)).permute(2, 0, 1)

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        return f"max_distance={self.max_distance}"
