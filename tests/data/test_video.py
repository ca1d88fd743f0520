"""Video files: what is written is what is read, by presentation time, and what is broken is said to be."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fastvdiff.data import VideoError, iter_frames, read_video, sample_spec, write_video
from fastvdiff.data.shapes import render_clip


def psnr(a, b) -> float:
    error = np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def grey_levels(count: int, size: int = 32) -> np.ndarray:
    """Frames whose grey level says which frame they are: 20, 24, 28, ..."""
    return np.broadcast_to(
        (20 + 4 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, size, size, 3)
    ).copy()


def which(frames: torch.Tensor) -> list[int]:
    """The numbers of frames made by grey_levels."""
    return ((frames.float().mean((1, 2, 3)) - 20) / 4).round().int().tolist()


def encode(
    path: Path, frames: np.ndarray, pts: list[int], time_base: Fraction, container_format: str, **stream_options
):
    """Write frames with chosen presentation times."""
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "4", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.time_base = time_base
        for name, value in stream_options.items():
            setattr(stream.codec_context, name, value)
        for image, time in zip(frames, pts, strict=True):
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            picture.pts, picture.time_base = time, time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


@pytest.fixture
def clip() -> np.ndarray:
    return render_clip(sample_spec(0, 3), 16, 32)


@pytest.mark.parametrize(
    ("size", "pixel_format", "least"),
    [((32, 32), None, 32), ((32, 32), "yuv444p", 40), ((48, 64), None, 32), ((33, 47), None, 40), ((1, 1), None, 40)],
    ids=["even", "444", "wide", "odd", "one_pixel"],
)
def test_mp4_round_trip(tmp_path, size, pixel_format, least):
    full = render_clip(sample_spec(0, 3), 16, 64)
    frames = full[:, : size[0], : size[1]]
    write_video(tmp_path / "a.mp4", frames, 8, pixel_format=pixel_format)
    video = read_video(tmp_path / "a.mp4")
    assert video.frames.shape == frames.shape
    assert video.frames.dtype == torch.uint8
    assert video.fps == pytest.approx(8)
    np.testing.assert_allclose(video.times, np.arange(16) / 8)
    assert psnr(video.frames, frames) > least


def test_enlarged_pixels_stay_squares(tmp_path, clip):
    write_video(tmp_path / "a.mp4", clip, 8, scale=6)
    write_video(tmp_path / "a.gif", clip, 8, scale=6)
    video = read_video(tmp_path / "a.mp4").frames
    assert video.shape == (16, 192, 192, 3)
    assert psnr(video[:, 3::6, 3::6], clip) > 40
    assert Image.open(tmp_path / "a.gif").size == (192, 192)
    with pytest.raises(ValueError, match="scale: expected at least 1, got 0"):
        write_video(tmp_path / "a.mp4", clip, 8, scale=0)


@pytest.mark.parametrize("fps", [1, 7.5, 24, 29.97, 60])
def test_mp4_keeps_the_rate(tmp_path, clip, fps):
    write_video(tmp_path / "a.MP4", torch.from_numpy(clip), fps)
    assert read_video(tmp_path / "a.MP4").fps == pytest.approx(fps, rel=1e-3)


def test_the_same_frames_give_the_same_bytes(tmp_path, clip):
    rng = np.random.default_rng(0)
    written = []
    for trial in range(6):  # other sizes in between, so that recycled memory differs
        write_video(tmp_path / "other.mp4", rng.integers(0, 255, (5, 8 + 6 * trial, 20, 3), dtype=np.uint8), 8)
        write_video(tmp_path / "a.mp4", clip, 8)
        written.append((tmp_path / "a.mp4").read_bytes())
    assert len(set(written)) == 1


def test_gif_lasts_as_long_as_the_clip(tmp_path, clip):
    write_video(tmp_path / "a.gif", clip, 8)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (16, (32, 32), 0)
        durations, images = [], []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            durations.append(gif.info["duration"])
            images.append(np.asarray(gif.convert("RGB")))
    assert set(durations) == {120, 130}
    assert sum(durations) == 2000
    assert psnr(np.stack(images), clip) > 30


def test_png_sheet_shows_every_frame_enlarged(tmp_path, clip):
    write_video(tmp_path / "a.png", clip[:11], 8)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (2 * 130 + 2, 8 * 130 + 2, 3)
    for index in range(11):
        top, left = 2 + index // 8 * 130, 2 + index % 8 * 130
        np.testing.assert_array_equal(sheet[top : top + 128 : 4, left : left + 128 : 4], clip[index])
    assert (sheet[132:260, 2 + 3 * 130 : 130 + 3 * 130] == 255).all()


@pytest.mark.parametrize(
    ("frames", "name", "fps", "error", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), "a.webm", 8, ValueError, r"unknown suffix '.webm'.*known: .mp4, .gif, .png"),
        (np.zeros((2, 8, 8, 3), np.uint8), "a", 8, ValueError, r"unknown suffix ''"),
        (np.zeros((2, 3, 8, 8), np.uint8), "a.mp4", 8, ValueError, r"\(T, H, W, 3\).*got \(2, 3, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "a.gif", 8, ValueError, r"got \(0, 8, 8, 3\)"),
        (np.zeros((2, 8, 8, 3), np.float32), "a.mp4", 8, TypeError, r"expected dtype uint8.*got float32"),
        (torch.zeros(2, 8, 8, 3), "a.mp4", 8, TypeError, r"expected dtype uint8.*got float32"),
        ([[1]], "a.mp4", 8, TypeError, r"NumPy array or torch tensor, got list"),
        (np.zeros((2, 8, 8, 3), np.uint8), "a.mp4", 0, ValueError, r"fps: expected a positive number, got 0"),
        (np.zeros((2, 8, 8, 3), np.uint8), "a.mp4", float("nan"), ValueError, r"fps: expected a positive number"),
        (np.zeros((2, 8, 8, 3), np.uint8), "a.gif", 60, ValueError, r"at most 50 frames a second.*got 60"),
        (np.zeros((2, 8, 8, 3), np.uint8), "no/a.mp4", 8, FileNotFoundError, r"the folder .*no does not exist"),
    ],
)
def test_write_refuses(tmp_path, frames, name, fps, error, message):
    with pytest.raises(error, match=message):
        write_video(tmp_path / name, frames, fps)
    assert list(tmp_path.iterdir()) == []


def test_write_refuses_pixel_formats(tmp_path):
    with pytest.raises(ValueError, match="'yuv420p' needs an even height and width, got 7x8"):
        write_video(tmp_path / "a.mp4", np.zeros((2, 7, 8, 3), np.uint8), 8, pixel_format="yuv420p")
    with pytest.raises(ValueError, match="expected 'yuv420p', 'yuv444p' or None, got 'rgb24'"):
        write_video(tmp_path / "a.mp4", np.zeros((2, 8, 8, 3), np.uint8), 8, pixel_format="rgb24")


def test_a_failed_write_leaves_the_old_file(tmp_path, clip, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, clip, 8)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_video(path, clip[:4], 8)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, list(range(30))),
        ({"fps": 10}, list(range(30))),
        ({"fps": 5}, list(range(0, 30, 2))),
        ({"fps": 20, "num_frames": 7}, [0, 0, 1, 1, 2, 2, 3]),
        ({"fps": 4, "num_frames": 5}, [0, 2, 5, 7, 10]),
        ({"fps": 10, "num_frames": 3, "start": 1.0}, [10, 11, 12]),
        ({"fps": 10, "num_frames": 2, "start": 1.05}, [10, 11]),
        ({"num_frames": 4, "start": 0.25}, [2, 3, 4, 5]),
        ({"fps": 10, "num_frames": 1, "start": 2.95}, [29]),
    ],
)
def test_frames_are_picked_by_time(tmp_path, options, expected):
    write_video(tmp_path / "a.mp4", grey_levels(30), 10)
    video = read_video(tmp_path / "a.mp4", **options)
    assert which(video.frames) == expected
    np.testing.assert_allclose(video.times, np.array(expected) / 10, atol=1e-4)


@pytest.mark.parametrize("container_format", ["mp4", "matroska"])
def test_variable_frame_rate(tmp_path, container_format):
    # Shown at 0, 0.1, 0.2, 1.0, 1.1 and 2.0 s.
    encode(tmp_path / "a.mp4", grey_levels(6), [0, 10, 20, 100, 110, 200], Fraction(1, 100), container_format)
    assert which(read_video(tmp_path / "a.mp4").frames) == [0, 1, 2, 3, 4, 5]
    assert which(read_video(tmp_path / "a.mp4", fps=4, num_frames=8).frames) == [0, 2, 2, 2, 3, 4, 4, 4]


def test_a_clock_of_milliseconds_repeats_no_frame(tmp_path):
    encode(tmp_path / "a.mkv", grey_levels(40), list(range(40)), Fraction(1, 30), "matroska")
    assert which(read_video(tmp_path / "a.mkv", fps=30, num_frames=40).frames) == list(range(40))


def test_iter_frames_stops_early_and_closes(tmp_path):
    write_video(tmp_path / "a.mp4", grey_levels(30), 10)
    frames = iter_frames(tmp_path / "a.mp4", num_frames=2)
    assert [round(frame.time, 3) for frame in frames] == [0.0, 0.1]


def test_colour_matrix_tag_is_honoured(tmp_path):
    frames = np.full((2, 32, 32, 3), (225, 35, 35), np.uint8)
    encode(tmp_path / "tagged.mp4", frames, [0, 1], Fraction(1, 30), "mp4", colorspace=1)  # says BT.709, holds BT.601
    write_video(tmp_path / "ours.mp4", frames, 8)
    assert np.abs(read_video(tmp_path / "ours.mp4").frames.numpy() - frames.astype(int)).max() <= 4
    assert np.abs(read_video(tmp_path / "tagged.mp4").frames.numpy() - frames.astype(int)).max() > 10


def test_a_video_on_its_side_comes_upright(tmp_path):
    frames = np.zeros((2, 32, 64, 3), np.uint8)
    frames[:, :16, :16] = 255  # a light in the top left corner
    write_video(tmp_path / "a.mp4", frames, 8)
    data = (tmp_path / "a.mp4").read_bytes()
    matrix = data.index(b"tkhd") + 4 + 40
    one, zero = (1 << 16).to_bytes(4, "big"), bytes(4)
    assert data[matrix : matrix + 4] == one
    clockwise = zero + one + zero + (-(1 << 16)).to_bytes(4, "big", signed=True) + zero + zero
    (tmp_path / "a.mp4").write_bytes(data[:matrix] + clockwise + data[matrix + 24 :])
    turned = read_video(tmp_path / "a.mp4").frames
    assert turned.shape == (2, 64, 32, 3)
    assert turned[0, :12, 20:].float().mean() > 240  # now in the top right
    assert turned[0, :12, :12].float().mean() < 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames: expected at least 1, got 0"),
        ({"fps": -1}, "fps: expected a positive number, got -1"),
        ({"start": -0.5}, "start: expected seconds >= 0, got -0.5"),
        ({"start": 9.0}, r"a.mp4: start=9 s is past its end \(2 s\)"),
        ({"num_frames": 17}, r"a.mp4: too short: 17 frames as stored from 0 s were asked for, it holds 16"),
        ({"num_frames": 9, "fps": 8, "start": 1}, r"too short: 9 frames at 8 fps from 1 s were asked for, it holds 8"),
        ({"max_bytes": 10_000}, "its frames take more than max_bytes=10,000"),
    ],
)
def test_read_refuses_requests(tmp_path, clip, options, message):
    write_video(tmp_path / "a.mp4", clip, 8)
    with pytest.raises(ValueError, match=message):
        read_video(tmp_path / "a.mp4", **options)


def test_read_names_what_is_wrong_with_the_file(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(VideoError, match=r"a.mp4: no such file"):
        read_video(path)
    with pytest.raises(VideoError, match=r"not a file"):
        read_video(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(VideoError, match=r"a.mp4: the file is empty"):
        read_video(path)
    path.write_text("this is not a video\n" * 50)
    with pytest.raises(VideoError, match=r"a.mp4: not a readable MP4, .* video \("):
        read_video(path)
    with pytest.raises(VideoError, match="no such file"):
        read_video("http://127.0.0.1:9/a.mp4")


@pytest.mark.parametrize("script", ["ffconcat version 1.0\nfile {}\n", "#EXTM3U\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"])
def test_a_playlist_under_a_video_name_opens_nothing(tmp_path, clip, script):
    write_video(tmp_path / "private.mp4", clip, 8)
    (tmp_path / "a.mp4").write_text(script.format(tmp_path / "private.mp4"))
    with pytest.raises(VideoError, match="not a readable"):
        read_video(tmp_path / "a.mp4")


def test_a_file_without_pictures(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 48000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="has no video stream"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_truncated_file_is_an_error_not_a_short_clip(tmp_path, suffix):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (30, 48, 48, 3), dtype=np.uint8)
    path = tmp_path / f"a{suffix}"
    encode(path, frames, list(range(30)), Fraction(1, 30), {".mp4": "mp4", ".mkv": "matroska"}[suffix])
    if suffix == ".mp4":  # the index first, so that a part of the file still decodes
        write_video(path, frames, 30)
    assert read_video(path).frames.shape[0] == 30
    data = path.read_bytes()
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    for cut in [len(data) // 3, len(data) // 2, len(data) * 9 // 10, ends[0], ends[14], ends[27]]:
        path.write_bytes(data[:cut])
        with pytest.raises(VideoError, match=r"a\.m.*(breaks off|not a readable|no frame)"):
            read_video(path)


def test_flipped_bits_do_not_pass_as_another_clip(tmp_path):
    rng = np.random.default_rng(1)
    frames = np.clip(np.cumsum(rng.normal(0, 6, (20, 64, 64, 3)), axis=1) + 128, 0, 255).astype(np.uint8)
    write_video(tmp_path / "clean.mp4", frames, 10)
    clean = read_video(tmp_path / "clean.mp4").frames
    data = (tmp_path / "clean.mp4").read_bytes()
    refused = 0
    for _ in range(20):
        damaged = bytearray(data)
        for position in rng.integers(len(data) // 8, len(data), 10):
            damaged[position] ^= 1 << rng.integers(8)
        (tmp_path / "a.mp4").write_bytes(damaged)
        try:
            assert psnr(read_video(tmp_path / "a.mp4").frames, clean) > 40
        except VideoError:
            refused += 1
    assert refused >= 15
