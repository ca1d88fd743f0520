"""Decoded frames on the disk: read through memory maps, kept between runs, shared by processes, capped in size."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastvdiff.data.atomic import written_aside

logger = logging.getLogger(__name__)

LAYOUT = 1  # of an entry: another number where frames would be made or stored in another way
SUFFIX = ".npy"
LOCK = "lock"
HEADER_BYTES = 128  # of a NumPy file
IN_USE_SECONDS = 3600.0  # an entry read within this time is not removed to make room
TOUCH_SECONDS = 600.0  # how stale an entry's time of use may become before it is written again
LEFTOVER_SECONDS = 3600.0  # a temporary file older than this belongs to a process that was killed


class FrameCache:
    """A folder of frames uint8 (C, N, H, W), one NumPy file per clip and way of reading it.

    ```python
    cache = FrameCache("frames", max_bytes=10 << 30)
    key = cache.key(path, fps=8.0, size=(32, 32))
    frames = cache.get(key)              # a memory map: only what is touched is read, and pages are shared
    if frames is None:
        cache.put(key, decode(path))
    ```

    A key holds the video's path, size and time of change: a changed video is another entry. Entries are written aside
    and renamed, so any number of processes and runs may share a folder, and a killed one leaves no torn entry. Where
    the next entry would pass `max_bytes`, those not read for an hour go, the longest unread first; if that is not
    enough the entry is not kept: data sets are read in epochs, where it is better to keep some clips than to replace
    all of them in turn. A full disk ends the keeping, with a warning, and never the run.

    Raises:
        OSError: the folder cannot be made.
        ValueError: max_bytes is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"FrameCache: max_bytes: expected at least 1, got {max_bytes}")
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keeping = True
        with self._locked() as total:
            self._remove_leftovers()
            total.write(sum(size for _, size, _ in self._entries()))  # a process may have been killed between the two

    def key(self, video: Path, fps: float | None, size: tuple[int, int]) -> str:
        """The name of a video's entry when read at `fps` and fitted to `size` = (H, W)."""
        stat = video.stat()
        facts = [LAYOUT, str(video.resolve()), stat.st_size, stat.st_mtime_ns, fps, *size]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]

    def get(self, key: str) -> np.ndarray | None:
        """The entry as a copy-on-write memory map, or None where there is none; a damaged one is removed."""
        path = self._path(key)
        try:
            frames = np.load(path, mmap_mode="c", allow_pickle=False)
            if frames.dtype != np.uint8 or frames.ndim != 4:
                raise ValueError(f"expected uint8 (C, N, H, W), it is {frames.dtype} {frames.shape}")
            if time.time() - path.stat().st_mtime > TOUCH_SECONDS:
                os.utime(path)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError, OSError) as error:
            logger.warning("%s: damaged, decoded again: %s", path, error)
            path.unlink(missing_ok=True)
            return None
        return frames

    def put(self, key: str, frames: np.ndarray) -> None:
        """Keep an entry, if there is room for it."""
        path, size = self._path(key), frames.nbytes + HEADER_BYTES
        if not self._keeping or size > self.max_bytes:
            return
        try:
            with self._locked() as total:
                if path.exists() or not self._make_room(total, size):
                    return
                with written_aside(path) as temporary, temporary.open("wb") as stream:
                    np.save(stream, frames, allow_pickle=False)
                total.write(total.read() + path.stat().st_size)
        except OSError as error:
            self._keeping = False
            logger.warning("%s: no more frames are kept, they are decoded each time: %s", self.folder, error)

    def total_bytes(self) -> int:
        """The size of all entries."""
        return sum(size for _, size, _ in self._entries())

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_Total]:
        """One process at a time counts and writes; readers do not wait. A killed process holds nothing."""
        with open(os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield _Total(stream.fileno())

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Every entry's time of use, size and path; one that goes meanwhile is left out."""
        entries = []
        with os.scandir(self.folder) as files:
            for file in files:
                if file.name.endswith(SUFFIX):
                    with contextlib.suppress(FileNotFoundError):
                        stat = file.stat()
                        entries.append((stat.st_mtime, stat.st_size, Path(file.path)))
        return entries

    def _make_room(self, total: _Total, size: int) -> bool:
        """Whether `size` more bytes fit, after removing what has not been read for long."""
        if total.read() + size <= self.max_bytes:
            return True
        entries = sorted(self._entries())
        held = sum(each for _, each, _ in entries)
        unused = time.time() - IN_USE_SECONDS
        for used, each, path in entries:
            if held + size <= self.max_bytes or used > unused:
                break
            path.unlink(missing_ok=True)
            held -= each
        total.write(held)
        return held + size <= self.max_bytes

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(f".*{SUFFIX}.tmp-*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                    path.unlink()


class _Total:
    """The sum of all entries' sizes, in the lock's own file, so that not every entry has to be asked for it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def read(self) -> int:
        return int.from_bytes(os.pread(self.descriptor, 8, 0), "little")

    def write(self, size: int) -> None:
        os.pwrite(self.descriptor, size.to_bytes(8, "little"), 0)
