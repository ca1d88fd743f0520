"""Decoded frames on the disk: the same frames, in less time, within a size, whatever else uses the folder."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastvdiff.data import BatchSchedule, FrameCache, VideoError, VideoFolder, collate, write_shapes
from fastvdiff.data import cache as module

SHAPE = (3, 4, 8, 8)
ENTRY = 3 * 4 * 8 * 8 + module.HEADER_BYTES


def frames(value: int = 1) -> np.ndarray:
    return np.full(SHAPE, value, np.uint8)


def entries(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.npy")}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "clips"
    write_shapes(folder, clips=6, num_frames=6, size=16)
    return folder


def open_folder(shapes: Path, folder: Path | None, **options: object) -> VideoFolder:
    return VideoFolder(shapes, num_frames=4, size=8, cache_folder=folder, random_flip=True, **options)


def test_entries_survive_the_process_that_wrote_them(tmp_path: Path) -> None:
    FrameCache(tmp_path, 1 << 20).put("a", frames(7))
    other = FrameCache(tmp_path, 1 << 20)
    kept = other.get("a")
    assert isinstance(kept, np.memmap)
    assert np.array_equal(kept, frames(7))
    assert other.get("b") is None
    assert other.total_bytes() == ENTRY
    kept[:] = 0  # a copy of the page, not the file
    assert np.array_equal(other.get("a"), frames(7))


def test_samples_are_those_without_a_cache(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, filling = open_folder(shapes, None, cache=False), open_folder(shapes, tmp_path)
    keys = [(epoch, index) for epoch in range(2) for index in range(6)]
    expected = [plain[key] for key in keys]

    def assert_expected(videos: VideoFolder) -> None:
        for key, sample in zip(keys, expected, strict=True):
            assert torch.equal(videos[key]["video"], sample["video"])
            assert videos[key]["caption"] == sample["caption"]

    assert_expected(filling)
    assert len(entries(tmp_path)) == 6
    monkeypatch.setattr("fastvdiff.data.dataset.iter_frames", None)  # a decoder that nobody asks
    assert_expected(open_folder(shapes, tmp_path))


def test_another_way_of_reading_is_another_entry(shapes: Path, tmp_path: Path) -> None:
    cache, video = FrameCache(tmp_path, 1 << 20), next(shapes.rglob("*.mp4"))
    keys = {cache.key(video, None, (8, 8)), cache.key(video, 4.0, (8, 8)), cache.key(video, None, (8, 16))}
    before = video.stat()
    assert cache.key(video, None, (8, 8)) in keys
    os.utime(video, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    keys.add(cache.key(video, None, (8, 8)))
    assert len(keys) == 4


def test_size_is_capped_and_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 3 * ENTRY)
    for name in "abcd":
        cache.put(name, frames())
    assert entries(tmp_path) == {"a", "b", "c"}
    old = time.time() - 2 * module.IN_USE_SECONDS
    os.utime(tmp_path / "b.npy", (old, old))
    os.utime(tmp_path / "c.npy", (old - 10, old - 10))
    cache.put("d", frames())
    assert entries(tmp_path) == {"a", "b", "d"}
    assert cache.get("b") is not None  # read: in use again
    cache.put("e", frames())
    assert entries(tmp_path) == {"a", "b", "d"}
    os.utime(tmp_path / "a.npy", (old, old))
    cache.put("f", np.zeros((3, 40, 8, 8), np.uint8))  # more than the cache holds: nothing goes for it
    assert entries(tmp_path) == {"a", "b", "d"}
    assert cache.total_bytes() == 3 * ENTRY


def test_the_count_is_made_anew_at_opening(tmp_path: Path) -> None:
    """A process killed between an entry and its counting leaves a wrong sum, and a temporary file."""
    FrameCache(tmp_path, 2 * ENTRY).put("a", frames())
    (tmp_path / module.LOCK).write_bytes((10**12).to_bytes(8, "little"))
    leftover, recent = tmp_path / ".x.npy.tmp-1", tmp_path / ".y.npy.tmp-2"
    leftover.touch()
    recent.touch()
    old = time.time() - 2 * module.LEFTOVER_SECONDS
    os.utime(leftover, (old, old))
    cache = FrameCache(tmp_path, 2 * ENTRY)
    assert (leftover.exists(), recent.exists()) == (False, True)
    cache.put("b", frames())
    assert entries(tmp_path) == {"a", "b"}


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"x" * 4000, "truncated", "floats"])
def test_a_damaged_entry_is_decoded_again(
    tmp_path: Path, content: bytes | str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FrameCache(tmp_path, 1 << 20)
    cache.put("a", frames())
    path = tmp_path / "a.npy"
    if content == "truncated":
        os.truncate(path, ENTRY - 1)
    elif content == "floats":
        np.save(path, np.zeros(SHAPE))
    else:
        path.write_bytes(content)
    assert cache.get("a") is None
    assert "a.npy: damaged, decoded again" in caplog.text
    cache.put("a", frames(3))
    assert np.array_equal(cache.get("a"), frames(3))


def test_a_full_disk_ends_the_keeping_and_not_the_run(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    videos, plain = open_folder(shapes, tmp_path), open_folder(shapes, None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        for index in range(6):
            assert torch.equal(videos[index]["video"], plain[index]["video"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert entries(tmp_path) == set()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "no more frames are kept" in caplog.text


def test_a_missing_clip_is_missing(shapes: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "clips", clips=2, num_frames=6, size=16)
    videos = open_folder(tmp_path / "clips", tmp_path / "cache")
    videos[0]
    videos.clips[0].path.unlink()
    with pytest.raises(VideoError, match="no such file"):
        videos[0]


def _write_for_ever(folder: Path, first: int) -> None:
    cache = FrameCache(folder, 40 * ENTRY)
    for number in range(first, first + 10_000):
        cache.put(f"{number % 60}", frames(number % 60))


def test_processes_share_it_and_may_be_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_for_ever, args=(tmp_path, 17 * k)) for k in range(4)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 60
    while len(entries(tmp_path)) < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    cache = FrameCache(tmp_path, 40 * ENTRY)
    kept = entries(tmp_path)
    assert len(kept) >= 20
    assert cache.total_bytes() <= 40 * ENTRY
    for name in kept:
        assert np.array_equal(cache.get(name), frames(int(name)))


def test_workers_fill_it_together(shapes: Path, tmp_path: Path) -> None:
    schedule = BatchSchedule(6, 2)
    expected = [collate([open_folder(shapes, None)[key] for key in keys]) for keys in schedule.keys(0, 6)]
    loader = DataLoader(
        open_folder(shapes, tmp_path), batch_sampler=schedule.keys(0, 6), collate_fn=collate, num_workers=2
    )
    for batch, wanted in zip(loader, expected, strict=True):
        assert torch.equal(batch["video"], wanted["video"])
    assert len(entries(tmp_path)) == 6


def test_bad_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FrameCache: max_bytes: expected at least 1, got 0"):
        FrameCache(tmp_path, 0)
