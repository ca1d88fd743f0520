"""The clips of a run: which are trained on, which are held out, and in which order they come."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fastvdiff.data import Batch, VideoFolder, collate, read_captions, read_video

from .config import TrainConfig
from .interruption import Interruption


def open_clips(config: TrainConfig) -> VideoFolder:
    """The clips to train on: all of the folder but those that the validation loss holds out.

    Raises ValueError or FileNotFoundError for a folder that cannot be read, or where nothing is left to train on.
    """
    folder, validation, numbers = config.data.folder, config.validation, None
    if validation.holds_out:
        numbers = _shuffled(folder, config.seed)[validation.clips :]
        if len(numbers) < config.run.batch_size:
            raise ValueError(
                f"validation.clips: {validation.clips} held out of {folder} leave {len(numbers)} clips to train on, "
                f"run.batch_size is {config.run.batch_size}"
            )
    return _open(config, folder, numbers, config.data.random_flip)


def open_held_out(config: TrainConfig) -> VideoFolder | None:
    """The clips of the validation loss, never mirrored; None where the configuration wants no such loss."""
    validation = config.validation
    if not validation.every:
        return None
    folder = validation.folder or config.data.folder
    return _open(config, folder, _shuffled(folder, config.seed)[: validation.clips], random_flip=False)


def _shuffled(folder: str, seed: int) -> list[int]:
    """The numbers of a folder's clips in an order of the seed's own, which has nothing to do with the epochs'."""
    count = len(read_captions(Path(folder)))
    return np.random.default_rng([seed, count, count]).permutation(count).tolist()


def _open(config: TrainConfig, folder: str, numbers: Sequence[int] | None, random_flip: bool) -> VideoFolder:
    data = config.data
    return VideoFolder(
        folder,
        num_frames=data.num_frames,
        size=(data.height, data.width),
        fps=data.fps,
        seed=config.seed,
        random_flip=random_flip,
        cache=data.cache_mib > 0,
        cache_bytes=data.cache_mib << 20,
        cache_folder=data.cache_folder,
        strict=not data.skip_broken,
        numbers=None if numbers is None else sorted(numbers),
    )


def loader(
    clips: VideoFolder, keys: Iterator[list[tuple[int, int]]], workers: int, device: torch.device
) -> Iterator[Batch]:
    """The batches of these (epoch, index) keys, in their order with any number of worker processes."""
    # Forked workers notice within seconds that their parent was killed. Those of a fork server, which newer Pythons
    # start by default, have the server as their parent, and stay.
    forked = workers > 0 and sys.platform == "linux"
    return iter(
        DataLoader(
            clips,
            batch_sampler=keys,
            collate_fn=collate,
            num_workers=workers,
            worker_init_fn=_leave_signals_to_training,
            multiprocessing_context="fork" if forked else None,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
        )
    )


def end_workers(batches: Iterator[Batch]) -> None:
    """Stop the processes behind what `loader` gave, now: the traceback of an error would keep them alive.

    And a process that exits would wait for them for ever, as they ignore the signal that it ends them with.
    """
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()


def _leave_signals_to_training(worker: int) -> None:
    """Ctrl-C reaches the whole group, a scheduler's SIGTERM often too: the training process ends its step and saves."""
    for number in Interruption.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def identity(clips: VideoFolder) -> tuple[str, int]:
    """What tells one data set from another: a hash of which clips there are, in which order and what they are called.

    And the size of all files together, which other videos under the same names seldom have.
    """
    digest, size = hashlib.sha256(), 0
    for clip in clips.clips:
        relative = clip.path.relative_to(clips.root.resolve()).as_posix()
        digest.update(json.dumps([relative, clip.caption]).encode())
        size += clip.path.stat().st_size
    return digest.hexdigest(), size


def description(clips: VideoFolder) -> dict[str, Any]:
    """What the data set says of itself, in its dataset.json; empty where it says nothing."""
    file = clips.root / "dataset.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def frame_rate(clips: VideoFolder, fps: float | None) -> float:
    """Frames per second of the training clips: as configured, else the first clip's own."""
    return fps or read_video(clips.clips[0].path, num_frames=clips.num_frames).fps
