"""A folder of captioned videos as a torch data set."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from fastvdiff.data.cache import FrameCache
from fastvdiff.data.captions import read_captions, swap_left_right
from fastvdiff.data.video import MAX_BYTES, VideoError, iter_frames

logger = logging.getLogger(__name__)

MAX_BROKEN = 0.01  # of the clips, when broken ones are replaced: more than this is no longer the same data


class Sample(TypedDict):
    """One clip: `video` float32 (C, T, H, W) in [-1, 1], its caption, and its number among the clips used."""

    video: torch.Tensor
    caption: str
    index: int


class Batch(TypedDict):
    """Several clips: `video` float32 (B, C, T, H, W) in [-1, 1], B captions, `index` int64 (B,)."""

    video: torch.Tensor
    caption: list[str]
    index: torch.Tensor


class VideoFolder(Dataset[Sample]):
    """Captioned videos of a folder (see `read_captions`), each as `num_frames` frames of one size.

    Sample `index` of epoch `epoch` is a function of (seed, epoch, index) only: which frames of a longer video, and
    whether it is mirrored ("left" and "right" in the caption then change places). So a run repeats exactly with any
    number of workers and resumes at any step (see `BatchSchedule`).

    A video is decoded whole, at `fps`, and shrunk as it is read: meant for clips of seconds. With `cache` the shrunk
    uint8 frames are kept until `cache_bytes` are full: in memory, in each worker process its own, or with a
    `cache_folder` on the disk, for all of them and for later runs (see `FrameCache`).

    Args:
        root: the folder.
        num_frames: frames of a sample; a video with fewer is an error.
        size: height and width of a sample, or (H, W). The short side is resized (bilinear, anti-aliased), the rest cut
            off evenly, all frames alike.
        fps: frames per second to sample at, by presentation time; None: every frame as stored.
        seed: of the random choices; not negative.
        random_flip: mirror half of the samples.
        cache, cache_bytes, cache_folder: keep decoded frames, at most so many bytes, in memory or in that folder.
        strict: True: a broken video raises. False: it is replaced by another clip, a function of (seed, epoch, index),
            with a warning; more than one broken clip and 1 % of all raise all the same.
        numbers: use only these of the folder's clips, by their place in `read_captions`; an index then counts them.

    Raises:
        FileNotFoundError, ValueError: from `read_captions`, at construction.
        VideoError: a video is missing, broken or too short, when its sample is asked for.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        num_frames: int,
        size: int | tuple[int, int],
        fps: float | None = None,
        seed: int = 0,
        random_flip: bool = False,
        cache: bool = True,
        cache_bytes: int = 2 << 30,
        cache_folder: str | os.PathLike[str] | None = None,
        strict: bool = True,
        numbers: Sequence[int] | None = None,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        for name, value, least in (("num_frames", num_frames, 1), ("size", min(height, width), 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"VideoFolder: {name}: expected at least {least}, got {value}")
        if fps is not None and not fps > 0:
            raise ValueError(f"VideoFolder: fps: expected a positive number, got {fps}")
        self.root = Path(root)
        self.clips = read_captions(self.root)
        if numbers is not None:
            outside = [number for number in numbers if not 0 <= number < len(self.clips)]
            if outside or not numbers:
                got = f"got {outside[0]}" if outside else "got none"
                raise ValueError(f"VideoFolder: numbers: expected some of 0 to {len(self.clips) - 1}, {got}")
            self.clips = [self.clips[number] for number in numbers]
        self.num_frames, self.size, self.fps = num_frames, (height, width), fps
        self.seed, self.random_flip, self.strict = seed, random_flip, strict
        self.epoch = 0
        self._budget = cache_bytes if cache else 0
        self._disk = FrameCache(cache_folder, cache_bytes) if cache and cache_folder is not None else None
        self._cached: dict[int, torch.Tensor] = {}
        self._broken: dict[int, VideoError] = {}

    def __len__(self) -> int:
        return len(self.clips)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of plain indices. Worker processes do not see it: give them (epoch, index) keys."""
        if epoch < 0:
            raise ValueError(f"VideoFolder: epoch: expected at least 0, got {epoch}")
        self.epoch = epoch

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample of an index, in the current epoch, or of an (epoch, index) pair."""
        epoch, index = key if isinstance(key, tuple) else (self.epoch, key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"VideoFolder: index {index} out of range for {len(self)} clips")
        index %= len(self)
        rng = np.random.default_rng([self.seed, epoch, index])
        position, flip = rng.random(), self.random_flip and rng.random() < 0.5
        index, frames = self._frames_or_another(index, rng)
        first = int(position * (frames.shape[1] - self.num_frames + 1))
        video = frames[:, first : first + self.num_frames].float().div(127.5).sub(1.0)
        caption = self.clips[index].caption
        if flip:
            video, caption = video.flip(-1), swap_left_right(caption)
        return Sample(video=video, caption=caption, index=index)

    def _frames_or_another(self, index: int, rng: np.random.Generator) -> tuple[int, torch.Tensor]:
        """The clip's frames, or unless `strict` those of a drawn replacement; with the number of the clip used."""
        while True:
            try:
                return index, self._frames(index)
            except VideoError as error:
                if self.strict:
                    raise
                if index not in self._broken:
                    logger.warning("replaced by another clip: %s", error)
                self._broken[index] = error
                if len(self._broken) > max(1, MAX_BROKEN * len(self)) or len(self) == 1:
                    raise VideoError(
                        f"{len(self._broken)} of {len(self)} clips are broken; the last: {error}"
                    ) from error
                index = int(rng.random() * len(self))

    def _frames(self, index: int) -> torch.Tensor:
        """All frames of a clip at the sampling rate, uint8 (C, N, H, W) with N >= num_frames."""
        if index in self._broken:
            raise self._broken[index]
        path = self.clips[index].path
        frames = self._cached.get(index)
        if frames is None:
            frames = self._decoded(path) if self._disk is None else self._from_disk(path, self._disk)
            if self._disk is None and frames.nbytes <= self._budget:
                self._budget -= frames.nbytes
                self._cached[index] = frames
        if frames.shape[1] < self.num_frames:
            rate = "as stored" if self.fps is None else f"at {self.fps:g} fps"
            raise VideoError(f"{path}: too short: {frames.shape[1]} frames {rate}, num_frames={self.num_frames}")
        return frames

    def _decoded(self, path: Path) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        for frame in iter_frames(path, fps=self.fps):
            kept.append(_fitted(frame.image, self.size))
            if len(kept) * kept[0].nbytes > MAX_BYTES:
                raise VideoError(f"{path}: too long: its frames take more than {MAX_BYTES:,} bytes; cut it into clips")
        return torch.stack(kept, dim=1)

    def _from_disk(self, path: Path, disk: FrameCache) -> torch.Tensor:
        try:
            key = disk.key(path, self.fps, self.size)
        except FileNotFoundError as error:
            raise VideoError(f"{path}: no such file") from error
        kept = disk.get(key)
        if kept is not None:
            return torch.from_numpy(kept)
        frames = self._decoded(path)
        disk.put(key, frames.numpy())
        return frames


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch."""
    return Batch(
        video=torch.stack([sample["video"] for sample in samples]),
        caption=[sample["caption"] for sample in samples],
        index=torch.tensor([sample["index"] for sample in samples]),
    )


def _fitted(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (H, W, 3) to uint8 (3, *size): the smallest resize that covers `size`, then the centre of it."""
    planes = torch.from_numpy(image).permute(2, 0, 1)
    height, width = planes.shape[1:]
    scale = max(size[0] / height, size[1] / width)
    resized = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    if resized != (height, width):
        smooth = F.interpolate(planes[None].float(), resized, mode="bilinear", antialias=True, align_corners=False)
        planes = smooth[0].round().clamp(0, 255).to(torch.uint8)
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    return planes[:, top : top + size[0], left : left + size[1]].contiguous()
