"""Videos as rows of channels and back: views, not copies, in channels_last_3d."""

from __future__ import annotations

import torch


def to_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) as (B, T, S, C), a view when x is channels_last_3d."""
    return x.permute(0, 2, 3, 4, 1).flatten(2, 3)


def from_tokens(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, T, S, C) as (B, C, T, H, W), a view that is channels_last_3d when the tokens are contiguous."""
    return tokens.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3)
