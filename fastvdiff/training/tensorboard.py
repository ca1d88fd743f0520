"""Scalars and clips for TensorBoard. Its package is imported only where it is asked for."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastvdiff.data import write_video

GIF_FPS = 50.0  # the most that a GIF plays
LEAST_SIDE = 128  # pixels


def require_tensorboard() -> None:
    """Raise ValueError, which says what to install, where the package is not there."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError('output.tensorboard: tensorboard is not installed: pip install "fastvdiff[train]"')


class TensorBoard:
    """Event files in `folder`; what an earlier run wrote there after `first_step` is marked as replaced."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """One point for each value that is there."""
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def clips(self, step: int, clips: Mapping[str, np.ndarray], fps: float) -> None:
        """Each clip, uint8 (T, H, W, 3), under its name as a moving picture, for which `add_video` needs moviepy."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for name, frames in clips.items():
            _, height, width, _ = frames.shape
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=_gif(frames, fps))
            summary = Summary(value=[Summary.Value(tag=f"samples/{name}", image=image)])
            self.writer.file_writer.add_summary(summary, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self.writer.close()


def _gif(frames: np.ndarray, fps: float) -> bytes:
    """A GIF file's bytes, small frames enlarged."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.gif"
        write_video(path, frames, min(fps, GIF_FPS), scale=max(1, LEAST_SIDE // min(frames.shape[1:3])))
        return path.read_bytes()
