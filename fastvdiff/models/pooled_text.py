"""The text as one vector, for the time embedding."""

from __future__ import annotations

import torch
from torch import nn


class PooledText(nn.Module):
    """Mean of the text's tokens, normalised and projected, to be added to the time embedding.

    Attention brings the text to some resolutions, this to every residual block: what a clip shows as a whole is learned
    in far fewer steps.

    Args:
        width: of the text.
        channels: of the time embedding.

    Source: Saharia et al., "Photorealistic Text-to-Image Diffusion Models", arXiv:2205.11487, section 2.4.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, channels)

    def forward(self, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, L, width) and the (B, L) bool mask of the tokens that count -> (B, channels)."""
        if mask is None:
            pooled = text.mean(dim=1)
        else:
            weights = mask.unsqueeze(2).to(text.dtype)
            pooled = (text * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return self.linear(self.norm(pooled))
