"""`fastvdiff sample`: a video file from a prompt."""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .errors import refuse, refusing

if TYPE_CHECKING:
    from fastvdiff.sampling import TextToVideoPipeline

SUFFIXES = (".mp4", ".gif", ".png")
SHOWN_SIDE = 256  # smaller clips are enlarged by a whole factor, or a player shows a stamp with bleeding colours
MAX_PIXELS = 1 << 28  # of a whole clip: a mistyped size should not ask for all memory


@dataclass(frozen=True)
class Request:
    """The command's arguments, as typed."""

    prompt: str
    output: Path
    negative_prompt: str | None
    steps: int
    guidance: float
    eta: float
    seed: int | None
    num_frames: int | None
    size: str | None
    fps: float | None
    checkpoint: str
    impl: str | None


def sample(request: Request) -> None:
    """Sample and write; what can be refused is refused before the model is read."""
    _check(request)
    size = _parse_size(request.size)

    from fastvdiff import use_impl
    from fastvdiff.data import write_video
    from fastvdiff.sampling import TextToVideoPipeline, to_uint8

    with refusing(FileNotFoundError, ValueError):
        pipeline = TextToVideoPipeline.from_pretrained(request.checkpoint)
    _compare_with_training(request, pipeline, size)
    width, height = size or (pipeline.width, pipeline.height)
    fps = pipeline.fps if request.fps is None else request.fps
    with contextlib.ExitStack() as stack:
        if request.impl is not None:
            with refusing(ValueError):
                stack.enter_context(use_impl(request.impl))
        with refusing(ValueError, TypeError, NotImplementedError):
            video = pipeline(
                request.prompt,
                request.negative_prompt,
                request.steps,
                request.guidance,
                eta=request.eta,
                seed=request.seed,
                num_frames=request.num_frames,
                height=height,
                width=width,
            )
    sheet = request.output.suffix.lower() == ".png"  # which enlarges its frames by itself
    scale = 1 if sheet else max(1, SHOWN_SIDE // max(width, height))
    with refusing(ValueError, OSError):
        write_video(request.output, to_uint8(video.frames[0]), fps, scale=scale)
    size_shown = f"{width}x{height}" + (f", every pixel {scale}x{scale}," if scale > 1 else "")
    frames = video.frames.shape[1]
    typer.echo(f"{request.output}: {frames} frames of {size_shown} at {fps:g} fps, seed {video.seeds[0]}")


def _check(request: Request) -> None:
    """Refuse what is wrong whatever the checkpoint is."""
    if not request.prompt.strip():
        refuse("PROMPT: expected some text, got an empty one")
    if request.output.suffix.lower() not in SUFFIXES:
        refuse(f"--output: expected a name ending in {', '.join(SUFFIXES)}, got {str(request.output)!r}")
    if request.output.is_dir():
        refuse(f"--output: {request.output} is a folder")
    if not request.output.parent.is_dir():
        refuse(f"--output: the folder {request.output.parent} does not exist")
    for option, value in (("--steps", request.steps), ("--num-frames", request.num_frames)):
        if value is not None and value < 1:
            refuse(f"{option}: expected at least 1, got {value}")
    for option, number in (("--guidance", request.guidance), ("--eta", request.eta)):
        if not 0 <= number < float("inf"):
            refuse(f"{option}: expected a number from 0 upward, got {number:g}")
    if request.seed is not None and request.seed < 0:
        refuse(f"--seed: expected at least 0, got {request.seed}")
    if request.fps is not None and not 0 < request.fps < float("inf"):
        refuse(f"--fps: expected a positive number, got {request.fps:g}")


def _parse_size(text: str | None) -> tuple[int, int] | None:
    """(width, height) of "48x32" or "32"."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:[x*](\d+))?", text.strip().lower())
    if match is None:
        refuse(f"--size: expected WIDTHxHEIGHT or one number, such as 48x32, got {text!r}")
    width, height = int(match[1]), int(match[2] or match[1])
    if min(width, height) < 1:
        refuse(f"--size: expected sides of at least 1, got {width}x{height}")
    return width, height


def _compare_with_training(request: Request, pipeline: TextToVideoPipeline, size: tuple[int, int] | None) -> None:
    """Say so when the clip asked for is not of the kind that the model saw; refuse one far too large."""
    trained = (pipeline.width, pipeline.height, pipeline.num_frames)
    wanted = (*(size or trained[:2]), request.num_frames or trained[2])
    if math.prod(wanted) > MAX_PIXELS:
        refuse(f"--size, --num-frames: expected at most {MAX_PIXELS:,} pixels in all, got {math.prod(wanted):,}")
    if wanted != trained:
        typer.echo(
            f"Note: the model was trained on {trained[2]} frames of {trained[0]}x{trained[1]}; "
            f"{wanted[2]} of {wanted[0]}x{wanted[1]} may look worse.",
            err=True,
        )
