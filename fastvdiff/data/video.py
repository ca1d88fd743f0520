"""Video files in and out: decoded by presentation time, written whole or not at all.

Frames are `uint8 (T, H, W, 3)`, RGB, everywhere in this file. PyAV and Pillow are imported where they are used.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch

from fastvdiff.data.atomic import written_aside

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from PIL import Image

# What a hostile file may make FFmpeg do: read local files only, through the demuxers of plain video containers.
# Playlists and concat scripts (which open other files) are refused whatever the suffix says.
DEMUXER_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
}
MAX_PIXELS = 1 << 26  # of one frame: a header that declares more is refused before anything is allocated
MAX_BYTES = 4 << 30  # of the frames one read_video call may return

H264_CRF = 10
SMALL_FRAME = 128 * 128  # pixels; below it a codec's thread start-up costs more than the coding
SHEET_COLUMNS, SHEET_GAP, SHEET_MIN_SIDE = 8, 2, 128


class VideoError(ValueError):
    """A video file that cannot be used; the message is `path: reason`."""


class Frame(NamedTuple):
    """One decoded frame: seconds since the video's first frame, seconds on screen, `uint8 (H, W, 3)`."""

    time: float
    duration: float
    image: np.ndarray


class Video(NamedTuple):
    """Frames `uint8 (T, H, W, 3)`, their presentation times `float64 (T,)` in seconds, and frames per second."""

    frames: torch.Tensor
    times: torch.Tensor
    fps: float


def read_video(
    path: str | os.PathLike[str],
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
    max_bytes: int = MAX_BYTES,
) -> Video:
    """Read a video file by presentation time.

    ```python
    times = start + torch.arange(num_frames) / fps
    frames = [the latest frame presented at or before t for t in times]
    ```

    Args:
        path: an MP4, MOV, Matroska, WebM or AVI file; the content decides, not the suffix.
        num_frames: how many frames; None: up to the end of the video.
        fps: sampling rate in frames per second. None: every stored frame from `start` on, which for a
            variable-rate file is not evenly spaced.
        start: seconds after the first frame.
        max_bytes: upper limit on the size of the result.

    Returns:
        Video: `frames` uint8 (T, H, W, 3); `times` float64 (T,), when the picked frames are presented;
        `fps`, the rate asked for, else the mean rate of the frames read.

    Raises:
        VideoError: the file is missing, empty, not a video, truncated, damaged, shorter than asked, or
            larger than `max_bytes`. A file that breaks off never gives a shorter clip.
        ValueError: `num_frames`, `fps` or `start` out of range.
    """
    picked: list[Frame] = []
    for frame in iter_frames(path, num_frames=num_frames, fps=fps, start=start):
        picked.append(frame)
        if len(picked) * frame.image.nbytes > max_bytes:
            raise VideoError(
                f"{path}: its frames take more than max_bytes={max_bytes:,}; give num_frames or a lower fps"
            )
    frames = torch.from_numpy(np.stack([frame.image for frame in picked]))
    times = torch.tensor([frame.time for frame in picked], dtype=torch.float64)
    if fps is None:
        fps = len(picked) / (picked[-1].time + picked[-1].duration - picked[0].time)
    return Video(frames, times, float(fps))


def iter_frames(
    path: str | os.PathLike[str],
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
) -> Iterator[Frame]:
    """Yield the frames of `read_video` one at a time, so that a long file need not fit in memory.

    Arguments and errors are `read_video`'s. Times are compared to within one tick of the file's clock, at most 1 ms,
    because a container rounds them (Matroska to 1 ms). Decoding stops after the last frame asked for.
    """
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames: expected at least 1, got {num_frames}")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps: expected a positive number, got {fps}")
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start: expected seconds >= 0, got {start}")
    count, end = 0, 0.0
    for shown in _presented(Path(path)):
        end = shown.time + shown.duration
        if fps is None:
            repeats = int(end > start + shown.tolerance)
        else:
            # Sample times start + k / fps in [time, end), the count of those before `end` less those already given.
            repeats = max(0, math.ceil((end - shown.tolerance - start) * fps) - count)
        if num_frames is not None:
            repeats = min(repeats, num_frames - count)
        if repeats > 0:
            frame = Frame(shown.time, shown.duration, _rgb(shown.picture))
            yield from (frame for _ in range(repeats))
            count += repeats
        if count == num_frames:
            return
    if count == 0:
        raise VideoError(f"{path}: start={start:g} s is past its end ({end:g} s)")
    if num_frames is not None:
        rate = "as stored" if fps is None else f"at {fps:g} fps"
        raise VideoError(
            f"{path}: too short: {num_frames} frames {rate} from {start:g} s were asked for, "
            f"it holds {count} (it lasts {end:g} s)"
        )


class _Presented(NamedTuple):
    """A decoded picture, its time and duration, and how far the file may have rounded them (all in seconds)."""

    time: float
    duration: float
    tolerance: float
    picture: VideoFrame


def _presented(path: Path) -> Iterator[_Presented]:
    """Decode the whole file in presentation order, each picture lasting until the next one."""
    held: VideoFrame | None = None
    origin = duration = tolerance = 0.0
    for picture in _decoded(path):
        if picture.time is None:
            raise VideoError(f"{path}: a frame has no presentation time")
        if held is None:
            # An AVI's clock ticks once a frame and is exact, so a tick alone would be too generous.
            origin, tolerance = picture.time, min(float(picture.time_base), 1e-3)
        else:
            duration = picture.time - held.time
            if duration < 0:
                raise VideoError(f"{path}: presentation times run backwards at {picture.time:g} s")
            yield _Presented(held.time - origin, duration, tolerance, held)
        held = picture
    if held is not None:
        yield _Presented(held.time - origin, _duration(held) or duration or tolerance, tolerance, held)


def _duration(picture: VideoFrame) -> float:
    """Seconds the container says the picture stays, 0 when it does not say."""
    return float((picture.duration or 0) * picture.time_base)


def _decoded(path: Path) -> Iterator[VideoFrame]:
    """Yield every picture of the first video stream; raise VideoError unless all of them decode."""
    import av

    count = 0
    try:
        with _opened(path) as file, av.open(file, options=DEMUXER_OPTIONS) as container:
            if not container.streams.video:
                raise VideoError(f"{path}: has no video stream")
            stream = container.streams.video[0]
            codec = stream.codec_context
            width, height = codec.width, codec.height
            if width * height > MAX_PIXELS:
                raise VideoError(f"{path}: frames of {width}x{height} are more than {MAX_PIXELS:,} pixels")
            # Without "explode" a decoder papers over what it cannot read and says nothing.
            codec.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
            codec.thread_type = "AUTO"
            codec.thread_count = 1 if width * height <= SMALL_FRAME else 0
            ends = 0.0
            for picture in container.decode(stream):
                if picture.is_corrupt:
                    raise VideoError(f"{path}: frame {count} is damaged")
                if (picture.width, picture.height) != (width, height):
                    raise VideoError(
                        f"{path}: frame {count} is {picture.width}x{picture.height}, the header says {width}x{height}"
                    )
                count += 1
                ends = max(ends, (picture.time or 0.0) + _duration(picture))
                yield picture
            _require_all(path, container, count, ends)
    except av.error.FFmpegError as error:
        if count:
            raise VideoError(
                f"{path}: breaks off after {count} frames, truncated or damaged ({error.strerror})"
            ) from error
        raise VideoError(f"{path}: not a readable MP4, MOV, Matroska, WebM or AVI video ({error.strerror})") from error


def _opened(path: Path) -> BinaryIO:
    """Open a regular, non-empty file; PyAV gets the open file, so that a name can never be taken for a URL."""
    if not path.exists():
        raise VideoError(f"{path}: no such file")
    if not path.is_file():
        raise VideoError(f"{path}: not a file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes)")
    return path.open("rb")


def _require_all(path: Path, container: InputContainer, count: int, ends: float) -> None:
    """Refuse a file that stopped early without an error.

    An MP4 or AVI declares its frames, but an edit list (a trimmed phone video) hides some of them on purpose, so the
    duration, which is the trimmed one, must fall short too. Matroska declares a duration alone, which may count the
    last frame differently.
    """
    if count == 0:
        raise VideoError(f"{path}: holds no frame")
    stream = container.streams.video[0]
    if stream.frames and stream.duration:
        declared, slack = float(stream.duration * stream.time_base), 0.5
        fewer = count < stream.frames
    elif container.duration and len(container.streams) == 1:
        declared, slack = container.duration / 1e6, 1.5
        fewer = True
    else:
        return
    if fewer and ends < declared - slack * ends / count:
        raise VideoError(f"{path}: breaks off at {ends:g} s of {declared:g} s, truncated or damaged")


def _rgb(picture: VideoFrame) -> np.ndarray:
    """uint8 (H, W, 3), upright: phones store a portrait video on its side with a rotation beside it."""
    image = picture.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(image, k=round(picture.rotation / 90) % 4))


def write_video(
    path: str | os.PathLike[str],
    frames: np.ndarray | torch.Tensor,
    fps: float,
    *,
    scale: int = 1,
    pixel_format: str | None = None,
) -> None:
    """Write frames to `path`; the suffix decides: `.mp4` (H.264), `.gif`, or `.png` (one sheet of all frames).

    The file is written aside and renamed, so `path` is never half a video.

    Args:
        path: ends in .mp4, .gif or .png (any case); its folder must exist.
        frames: uint8 (T, H, W, 3), RGB, T, H, W >= 1; NumPy or torch.
        fps: frames per second. A GIF counts in 1/100 s: durations alternate so that their sum is right, and
            identical neighbouring frames are stored as one that lasts longer.
        scale: every pixel becomes a square of this many, so that tiny frames can be watched, and keep their colours
            in 4:2:0. For an MP4 or GIF; a sheet enlarges small frames by itself.
        pixel_format: of an MP4. None: "yuv420p", which every player shows, or for an odd height or width
            "yuv444p", which keeps the size (some browsers do not play it). 4:2:0 halves the resolution of
            colour; "yuv444p" keeps it, which matters for very small frames.

    Raises:
        TypeError, ValueError: the frames, fps, suffix or pixel format are not as above.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    writers = _writers(scale, pixel_format)
    if path.suffix.lower() not in writers:
        known = ", ".join(writers)
        raise ValueError(f"path: unknown suffix {path.suffix!r} of {path}; known: {known}")
    images = _checked_frames(frames)
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps: expected a positive number, got {fps}")
    if scale < 1:
        raise ValueError(f"scale: expected at least 1, got {scale}")
    with written_aside(path) as temporary:
        writers[path.suffix.lower()](temporary, images, fps)


def _enlarged(images: np.ndarray, scale: int) -> np.ndarray:
    """Each pixel of (T, H, W, 3) as scale x scale equal ones."""
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def frame_sheet(frames: np.ndarray | torch.Tensor) -> Image.Image:
    """Tile frames uint8 (T, H, W, 3) in reading order, 8 to a row, small ones enlarged by a whole factor."""
    from PIL import Image

    images = _checked_frames(frames)
    scale = max(1, SHEET_MIN_SIDE // min(images.shape[1:3]))
    images = _enlarged(images, scale)
    count, height, width, _ = images.shape
    columns = min(count, SHEET_COLUMNS)
    rows = -(-count // columns)
    step_y, step_x = height + SHEET_GAP, width + SHEET_GAP
    sheet = np.full((rows * step_y + SHEET_GAP, columns * step_x + SHEET_GAP, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = SHEET_GAP + index // columns * step_y, SHEET_GAP + index % columns * step_x
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)


def _writers(scale: int, pixel_format: str | None) -> dict[str, Callable[[Path, np.ndarray, float], None]]:
    return {
        ".mp4": lambda path, images, fps: _write_mp4(path, _enlarged(images, scale), fps, pixel_format),
        ".gif": lambda path, images, fps: _write_gif(path, _enlarged(images, scale), fps),
        ".png": lambda path, images, fps: frame_sheet(images).save(path, format="png"),
    }


def _checked_frames(frames: np.ndarray | torch.Tensor) -> np.ndarray:
    """The frames as a NumPy array, once type, dtype and shape are as `write_video` says."""
    if isinstance(frames, torch.Tensor):
        frames = frames.detach().cpu().numpy()
    if not isinstance(frames, np.ndarray):
        raise TypeError(f"frames: expected a NumPy array or torch tensor, got {type(frames).__name__}")
    if frames.dtype != np.uint8:
        raise TypeError(f"frames: expected dtype uint8 (0 to 255), got {frames.dtype}")
    if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"frames: expected shape (T, H, W, 3) with T, H, W >= 1, got {tuple(frames.shape)}")
    return np.ascontiguousarray(frames)


def _write_mp4(path: Path, images: np.ndarray, fps: float, pixel_format: str | None) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    _, height, width, _ = images.shape
    odd = height % 2 or width % 2
    pixel_format = pixel_format or ("yuv444p" if odd else "yuv420p")
    if pixel_format not in ("yuv420p", "yuv444p"):
        raise ValueError(f"pixel_format: expected 'yuv420p', 'yuv444p' or None, got {pixel_format!r}")
    if odd and pixel_format == "yuv420p":
        raise ValueError(f"pixel_format: 'yuv420p' needs an even height and width, got {height}x{width}")
    rate = Fraction(fps).limit_denominator(1001)
    # mbtree reads memory x264 never wrote when a frame is smaller than its lookahead blocks: the same frames then
    # give different files. Without B-frames, decoding order is presentation order and no edit list is needed.
    options = {"crf": str(H264_CRF), "x264-params": "mbtree=0:bframes=0"}
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        codec = stream.codec_context
        codec.thread_count = 1 if height * width <= SMALL_FRAME else 0
        # Untagged, a player guesses the matrix from the height, and colours shift on large videos.
        codec.colorspace, codec.color_range = int(Colorspace.ITU601), int(ColorRange.MPEG)
        for index, image in enumerate(images):
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            picture = picture.reformat(
                format=pixel_format, dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG
            )
            picture.pts, picture.time_base = index, 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _write_gif(path: Path, images: np.ndarray, fps: float) -> None:
    from PIL import Image

    if fps > 50:
        raise ValueError(f"fps: a GIF plays at most 50 frames a second (viewers slow shorter frames down), got {fps:g}")
    count = len(images)
    # One palette for the whole clip: with one per frame a still background flickers.
    palette = Image.fromarray(images.reshape(-1, images.shape[2], 3)).quantize(256)
    indexed = [Image.fromarray(image).quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    clock = [round(100 * index / fps) for index in range(count + 1)]
    durations = [10 * (after - before) for before, after in itertools.pairwise(clock)]
    indexed[0].save(path, format="gif", save_all=True, append_images=indexed[1:], duration=durations, loop=0)
