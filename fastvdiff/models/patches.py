"""Squares of pixels, over one or several frames, as channels and back, in channels_last_3d."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def patchify(x: torch.Tensor, size: int, frames: int = 1) -> torch.Tensor:
    """(B, C, T, H, W) -> (B, C * frames * size^2, ceil(T / frames), ceil(H / size), ceil(W / size)), channels last.

    Where frames does not divide T, or size H or W, the last frame, row or column is repeated.
    """
    batch, channels, length, height, width = x.shape
    if length % frames or height % size or width % size:
        x = F.pad(x, (0, -width % size, 0, -height % size, 0, -length % frames), mode="replicate")
    x = x.unflatten(4, (-1, size)).unflatten(3, (-1, size)).unflatten(2, (-1, frames))
    steps, rows, columns = x.shape[2], x.shape[4], x.shape[6]
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, steps, rows, columns, channels * frames * size * size)
    return x.permute(0, 4, 1, 2, 3).contiguous(memory_format=torch.channels_last_3d)


def unpatchify(x: torch.Tensor, size: int, shape: tuple[int, int, int], frames: int = 1) -> torch.Tensor:
    """The inverse of `patchify`, contiguous, cut to shape (T, H, W)."""
    batch, channels, steps, rows, columns = x.shape
    x = x.unflatten(1, (-1, frames, size, size)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(batch, channels // (frames * size * size), steps * frames, rows * size, columns * size)
    return x[:, :, : shape[0], : shape[1], : shape[2]].contiguous()
