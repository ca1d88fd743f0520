"""Squares of pixels as channels and back, in channels_last_3d."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def patchify(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, C, T, H, W) -> (B, C * size^2, T, ceil(H / size), ceil(W / size)) in channels_last_3d.

    Where size does not divide H or W, the last row or column is repeated.
    """
    batch, channels, frames, height, width = x.shape
    if height % size or width % size:
        x = F.pad(x, (0, -width % size, 0, -height % size, 0, 0), mode="replicate")
    x = x.unflatten(4, (-1, size)).unflatten(3, (-1, size))
    rows, columns = x.shape[3], x.shape[5]
    x = x.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, frames, rows, columns, channels * size * size)
    return x.permute(0, 4, 1, 2, 3).contiguous(memory_format=torch.channels_last_3d)


def unpatchify(x: torch.Tensor, size: int, height: int, width: int) -> torch.Tensor:
    """The inverse of `patchify`, contiguous, cut to (height, width)."""
    batch, channels, frames, rows, columns = x.shape
    x = x.unflatten(1, (-1, size, size)).permute(0, 1, 4, 5, 2, 6, 3)
    x = x.reshape(batch, channels // (size * size), frames, rows * size, columns * size)
    return x[..., :height, :width].contiguous()
