"""Samples in [-1, 1] as frames for people: arrays, tensors or images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image


def to_frames(samples: torch.Tensor, output_type: str) -> Any:
    """Turn samples (B, C, T, H, W) in [-1, 1], clamped, into frames.

    - "pt": float32 (B, C, T, H, W) in [0, 1], on the samples' device;
    - "np": float32 (B, T, H, W, C) in [0, 1];
    - "pil": B lists of T images.
    """
    scaled = ((samples.float() + 1) / 2).clamp(0, 1)
    if output_type == "pt":
        return scaled
    array = scaled.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()
    return array if output_type == "np" else [_images(video) for video in to_uint8(array)]


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames in [0, 1] as bytes, rounded to the nearest: what `fastvdiff.data.write_video` takes."""
    return np.rint(frames * 255).astype(np.uint8)


def _images(video: np.ndarray) -> list[Image.Image]:
    from PIL import Image

    return [Image.fromarray(frame) for frame in video]
