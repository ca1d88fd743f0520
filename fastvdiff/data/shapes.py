"""Captioned clips of one coloured shape moving in one direction: data that a small model can learn, from a seed.

Everything is a pure function of `(seed, index)`, so a data set is its parameters. Lengths are fractions of the frame's
side, y points down.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvdiff.data.atomic import written_aside
from fastvdiff.data.video import write_video

RENDERING = 1  # raised when the same parameters would give other clips; part of a data set's identity

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 32, 32),
    "orange": (255, 138, 16),
    "yellow": (252, 226, 40),
    "green": (36, 190, 60),
    "cyan": (40, 214, 224),
    "blue": (44, 84, 240),
    "purple": (166, 52, 214),
    "white": (250, 250, 250),
}
DIRECTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
MIRRORED = {"right": "left", "left": "right", "up": "up", "down": "down"}


def _star(points: int, inner: float) -> tuple[tuple[float, float], ...]:
    """Corners of a star that stands upright in the unit circle."""
    radii = itertools.cycle((1.0, inner))
    angles = (math.pi * k / points for k in range(2 * points))
    return tuple((r * math.sin(a), -r * math.cos(a)) for a, r in zip(angles, radii, strict=False))


# Corners in [-1, 1]^2; the circle has none. Scaled so that all cover a comparable area.
OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": (),
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)),
    "diamond": ((0.0, -1.0), (0.8, 0.0), (0.0, 1.0), (-0.8, 0.0)),
    "star": _star(5, 0.45),
    "cross": (
        *((-0.33, -1.0), (0.33, -1.0), (0.33, -0.33), (1.0, -0.33), (1.0, 0.33), (0.33, 0.33)),
        *((0.33, 1.0), (-0.33, 1.0), (-0.33, 0.33), (-1.0, 0.33), (-1.0, -0.33), (-0.33, -0.33)),
    ),
}
SHAPES = tuple(OUTLINES)
BACKGROUNDS = ("solid", "gradient", "checker", "noise")
PLAIN = "plain"  # one more kind, which a data set has on request only: PLAIN_COLOUR in every clip
PLAIN_COLOUR = (0.12, 0.12, 0.14)

Combination = tuple[str, str, str]  # colour, shape, direction
EXAMPLE: Combination = ("red", "circle", "right")  # the prompt the documentation uses is never held out

CAPTIONS = (
    "{article} {colour} {shape} moving {direction}",
    "{article} {colour} {shape} moves {direction}",
    "{article} {colour} {shape} moving {towards}",
    "{article} {colour} {shape} is moving {direction}",
    "{colour} {shape} moving {direction}",
)
CAPTION_WEIGHTS = (0.6, 0.1, 0.1, 0.1, 0.1)  # mostly the first: a small model should know one phrasing well
TOWARDS = {"right": "to the right", "left": "to the left", "up": "upwards", "down": "downwards"}


@dataclass(frozen=True)
class Background:
    """A still, muted background: kind, its two RGB colours in [0, 1], angle (radians), cells a side, noise seed."""

    kind: str
    colours: tuple[tuple[float, float, float], tuple[float, float, float]]
    angle: float
    cells: int
    noise_seed: int


@dataclass(frozen=True)
class ShapeSpec:
    """One clip: what moves where, drawn by `sample_spec`.

    `start` is the centre (x, y) in the first frame, `travel` the distance covered over the clip, `radius` half the
    width of the outline's box, `shade` a factor on the colour, `variant` the caption template.
    """

    colour: str
    shape: str
    direction: str
    radius: float
    start: tuple[float, float]
    travel: float
    shade: float
    background: Background
    variant: int

    @property
    def combination(self) -> Combination:
        """(colour, shape, direction)."""
        return self.colour, self.shape, self.direction


def sample_spec(
    seed: int,
    index: int,
    *,
    held_out: frozenset[Combination] = frozenset(),
    backgrounds: Sequence[str] = BACKGROUNDS,
) -> ShapeSpec:
    """Draw clip `index` of data set `seed`; combinations in `held_out` never occur.

    The shape stays whole inside the frame and travels 42 to 62 % of its side. backgrounds: kinds to draw from.
    """
    rng = np.random.default_rng([seed, index])
    while True:
        combination = (_pick(rng, COLOURS), _pick(rng, SHAPES), _pick(rng, DIRECTIONS))
        if combination not in held_out:
            break
    colour, shape, direction = combination
    radius = _between(rng, 0.14, 0.19)
    travel = _between(rng, 0.42, 0.62)
    low, high = radius + 0.01, 1 - radius - 0.01  # where the centre may be
    along = _between(rng, low, high - travel)
    across = _between(rng, low, high)
    step_x, step_y = DIRECTIONS[direction]
    if step_x + step_y < 0:
        along = 1 - along
    start = (along, across) if step_x else (across, along)
    variant = int(np.searchsorted(np.cumsum(CAPTION_WEIGHTS[:-1]), rng.random(), side="right"))
    shade = _between(rng, 0.9, 1.0)
    background = _sample_background(rng, backgrounds)
    return ShapeSpec(colour, shape, direction, radius, start, travel, shade, background, variant)


def caption(spec: ShapeSpec, variant: int | None = None) -> str:
    """The sentence for a clip, "a red circle moving right"; `variant` picks a template, None the clip's own."""
    return describe(spec.combination, spec.variant if variant is None else variant)


def describe(combination: Combination, variant: int = 0) -> str:
    """The sentence for a combination in template `variant` of `CAPTIONS`."""
    if not 0 <= variant < len(CAPTIONS):
        raise ValueError(f"variant: expected 0 to {len(CAPTIONS) - 1}, got {variant}")
    colour, shape, direction = combination
    article = "an" if colour[0] in "aeiou" else "a"
    return CAPTIONS[variant].format(
        article=article, colour=colour, shape=shape, direction=direction, towards=TOWARDS[direction]
    )


def choose_held_out(seed: int, fraction: float) -> list[Combination]:
    """Pick about `fraction` of all (colour, shape, direction) combinations to keep out of a data set, sorted.

    A combination goes with its mirror image: otherwise training with horizontal flips would show it after all.
    `EXAMPLE` and its mirror image are never picked.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"held_out: expected a fraction in [0, 1), got {fraction}")
    everything = itertools.product(COLOURS, SHAPES, DIRECTIONS)
    pairs = sorted({_with_mirror(each) for each in everything} - {_with_mirror(EXAMPLE)}, key=sorted)
    total = len(COLOURS) * len(SHAPES) * len(DIRECTIONS)
    chosen: set[Combination] = set()
    for position in np.random.default_rng([seed, total]).permutation(len(pairs)):
        if len(chosen) >= round(fraction * total):
            break
        chosen |= pairs[position]
    return sorted(chosen)


def render_clip(spec: ShapeSpec, num_frames: int, size: int) -> np.ndarray:
    """Draw a clip, uint8 (num_frames, size, size, 3), anti-aliased; motion is uniform from first to last frame."""
    if num_frames < 1 or size < 8:
        raise ValueError(f"expected num_frames >= 1 and size >= 8, got {num_frames} and {size}")
    progress = np.linspace(0.0, spec.travel, num_frames) if num_frames > 1 else np.zeros(1)
    step_x, step_y = DIRECTIONS[spec.direction]
    centres = (np.arange(size) + 0.5) / size
    # Position relative to the shape's centre, in radii: (T, 1, W) and (T, H, 1).
    x = (centres[None, None, :] - (spec.start[0] + step_x * progress)[:, None, None]) / spec.radius
    y = (centres[None, :, None] - (spec.start[1] + step_y * progress)[:, None, None]) / spec.radius
    distance = signed_distance(OUTLINES[spec.shape], x, y) * spec.radius * size  # in pixels, negative inside
    coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    ink = np.array(COLOURS[spec.colour]) / 255 * spec.shade
    frames = _background(spec.background, size) * (1 - coverage) + ink * coverage
    return np.rint(frames * 255).astype(np.uint8)


def write_shapes(
    directory: str | os.PathLike[str],
    *,
    clips: int,
    num_frames: int = 16,
    size: int = 32,
    fps: float = 8,
    seed: int = 0,
    held_out: float = 0.0,
    backgrounds: Sequence[str] = BACKGROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a data set of `clips` videos, their captions and its own description.

    `dataset.json` holds every parameter and the held-out combinations; `clips/000000.mp4` and on are H.264 in 4:4:4
    (4:2:0 would halve the colour resolution of frames this small); `captions.jsonl` has one object a line: file,
    caption, colour, shape, direction. The captions come last: a folder that has them is complete. Called again on
    a complete data set of the same parameters, it changes nothing; one that was interrupted is written anew.

    Args:
        directory: created if missing (not its parents).
        clips: how many videos.
        num_frames: frames of each.
        size: height and width in pixels, at least 8.
        fps: frames per second.
        seed: not negative. Clip k of a seed is the same whatever `clips` is.
        held_out: fraction of the combinations that no clip shows, see `choose_held_out`.
        backgrounds: kinds to draw from, of `BACKGROUNDS` and "plain", without repetition.
        progress: called with (clips done, clips in all) after each clip.

    Returns:
        What `dataset.json` holds.

    Raises:
        FileExistsError: the folder holds anything other than this very data set.
        FileNotFoundError: the parent folder does not exist.
        ValueError: a parameter out of range.
    """
    for name, value, least in (
        ("clips", clips, 1),
        ("num_frames", num_frames, 1),
        ("size", size, 8),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    kinds = (*BACKGROUNDS, PLAIN)
    if not backgrounds or not set(backgrounds) <= set(kinds) or len(set(backgrounds)) != len(backgrounds):
        raise ValueError(f"backgrounds: expected different ones of {', '.join(kinds)}, got {list(backgrounds)}")
    combinations = choose_held_out(seed, held_out)
    description = {
        "kind": "shapes",
        "rendering": RENDERING,
        "clips": clips,
        "num_frames": num_frames,
        "size": size,
        "fps": fps,
        "seed": seed,
        "backgrounds": list(backgrounds),
        "held_out_fraction": held_out,
        "held_out": [list(combination) for combination in combinations],
    }
    directory = Path(directory)
    captions = directory / "captions.jsonl"
    _claim(directory, description)
    if captions.exists():
        return description
    (directory / "clips").mkdir(exist_ok=True)
    lines = []
    for index in range(clips):
        spec = sample_spec(seed, index, held_out=frozenset(combinations), backgrounds=backgrounds)
        file = f"clips/{index:06d}.mp4"
        write_video(directory / file, render_clip(spec, num_frames, size), fps, pixel_format="yuv444p")
        fields = {"colour": spec.colour, "shape": spec.shape, "direction": spec.direction}
        lines.append(json.dumps({"file": file, "caption": caption(spec), **fields}) + "\n")
        if progress is not None:
            progress(index + 1, clips)
    with written_aside(captions) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return description


def _claim(directory: Path, description: dict[str, Any]) -> None:
    """Make `directory` the place of this data set: new, empty, or already described by the same parameters."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; a data set needs a folder")
    if not directory.parent.is_dir():
        raise FileNotFoundError(f"cannot create {directory}: the folder {directory.parent} does not exist")
    directory.mkdir(exist_ok=True)
    path = directory / "dataset.json"
    text = json.dumps(description, indent=2) + "\n"
    if not any(directory.iterdir()):
        with written_aside(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    elif not path.is_file():
        raise FileExistsError(f"{directory} is not empty and holds no shapes data set; give a new or empty folder")
    elif path.read_text(encoding="utf-8") != text:
        raise FileExistsError(
            f"{directory} holds a data set of other parameters (see {path}); give a new folder, or the same parameters"
        )


def signed_distance(corners: Sequence[tuple[float, float]], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of the points (x, y) to a polygon's edge (the unit circle's, without corners), negative inside.

    x and y broadcast together, in the corners' unit.
    """
    if not corners:
        return np.hypot(x, y) - 1.0
    squared, inside = np.inf, False
    for (ax, ay), (bx, by) in zip(corners, (*corners[1:], corners[0]), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        nearest = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        squared = np.minimum(squared, (px - nearest * ex) ** 2 + (py - nearest * ey) ** 2)
        if ey:  # even-odd rule: a horizontal edge is never crossed by a horizontal ray
            inside = inside ^ (((ay > y) != (by > y)) & (px < py * ex / ey))
    return np.where(inside, -1.0, 1.0) * np.sqrt(squared)


def _sample_background(rng: np.random.Generator, kinds: Sequence[str]) -> Background:
    """Two related colours, dark to medium and greyish, so that every shape colour stands out; "plain" is fixed."""
    base = _between(rng, 0.10, 0.38) + np.array([_between(rng, -0.06, 0.06) for _ in range(3)])
    kind = _pick(rng, kinds)
    if kind == PLAIN:
        return Background(PLAIN, (PLAIN_COLOUR, PLAIN_COLOUR), 0.0, 1, 0)
    contrast = {"solid": 0.0, "gradient": 0.16, "checker": 0.06, "noise": 0.10}[kind]
    other = base + contrast * (1 if base.mean() < 0.24 else -1)
    first, second = (tuple(float(v) for v in np.clip(c, 0.02, 0.5)) for c in (base, other))
    angle, cells = _between(rng, 0.0, 2 * math.pi), 4 + 2 * int(rng.random() * 3)
    return Background(kind, (first, second), angle, cells, int(rng.random() * 2**31))


def _background(background: Background, size: int) -> np.ndarray:
    """Draw a background, float (size, size, 3) in [0, 1]."""
    centres = (np.arange(size) + 0.5) / size
    x, y = centres[None, :], centres[:, None]
    if background.kind in ("solid", PLAIN):
        blend = np.zeros((size, size))
    elif background.kind == "gradient":
        along = (x - 0.5) * math.cos(background.angle) + (y - 0.5) * math.sin(background.angle)
        blend = 0.5 + along / math.sqrt(2)
    elif background.kind == "checker":
        blend = (np.floor(x * background.cells) + np.floor(y * background.cells)) % 2
    else:
        blend = _smooth_noise(background, centres)
    first, second = (np.array(colour) for colour in background.colours)
    return first + (second - first) * blend[..., None]


def _smooth_noise(background: Background, centres: np.ndarray) -> np.ndarray:
    """Random values on a grid of `cells` + 1 points a side, interpolated: (size, size) in [0, 1]."""
    points = background.cells + 1
    grid = np.random.default_rng(background.noise_seed).random((points, points))
    knots = np.linspace(0.0, 1.0, points)
    weights = np.clip(1 - np.abs(centres[:, None] - knots[None, :]) * background.cells, 0.0, 1.0)
    return weights @ grid @ weights.T


def _with_mirror(combination: Combination) -> frozenset[Combination]:
    colour, shape, direction = combination
    return frozenset({combination, (colour, shape, MIRRORED[direction])})


def _pick(rng: np.random.Generator, options: Iterable[str]) -> str:
    options = tuple(options)
    return options[int(rng.random() * len(options))]


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())
