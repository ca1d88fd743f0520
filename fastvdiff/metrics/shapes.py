"""Which coloured shape a clip shows and where it moves, read off the pixels: no network, no training.

The shapes of `fastvdiff.data.shapes` are bright and single-coloured on a dark background, so geometry answers all three
questions. The foreground is what is brighter than any background; its colour is compared with the palette's; its centre
in each frame gives the motion; and outlines of every kind, drawn where it is, are compared with it. A clip
that shows nothing clear gets None as an answer, not the nearest guess.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from fastvdiff.data.shapes import COLOURS, DIRECTIONS, OUTLINES, SHAPES, signed_distance

# In [0, 1]. The brightest channel of a background stays below 0.47, that of a shape above 0.66.
FOREGROUND = 0.56
# Shares of a frame: the smallest shape covers 3 % of it, the largest 9 %.
MIN_AREA, MAX_AREA = 0.015, 0.2
MIN_SHOWN = 0.875  # of the frames have to show it
# Of the frame's side, over the clip: data sets move by 0.42 to 0.62.
MIN_TRAVEL = 0.2
# Travel across the direction of motion, as a share of that along it.
MAX_SIDEWAYS = 0.4
# Distance in RGB from the nearest shade of a colour. Two colours of the palette are at least 0.3 apart.
MAX_COLOUR_DISTANCE = 0.25
SHADES = np.linspace(0.85, 1.0, 7)
# Squared difference from the best outline, as a share of the outline's own square: 1 is an outline on nothing.
MAX_SHAPE_ERROR = 0.3
RADII = np.linspace(0.11, 0.22, 12)
REFINED = (-0.75, 0.0, 0.75)  # pixels around the centre of mass at which the outlines are tried
FIELD_SIDE, FIELD_REACH = 512, 2.5  # the table of distances: samples a side, and how many radii it covers each way


@dataclass(frozen=True)
class ShapeReading:
    """What a clip shows: names of `fastvdiff.data.shapes`, or None where nothing clear was found.

    The margins say how clear it was, from 0 (a tie with the next best answer) to 1: for the colour and the shape one
    minus the ratio of the two smallest errors, for the direction one minus the ratio of travel across and along it.
    `travel` is (x, y) over the clip, as a share of the frame's side, y down. `shape_error` is the best outline's.
    """

    colour: str | None
    shape: str | None
    direction: str | None
    colour_margin: float
    shape_margin: float
    direction_margin: float
    travel: tuple[float, float]
    shape_error: float


_NOTHING = ShapeReading(None, None, None, 0.0, 0.0, 0.0, (0.0, 0.0), 1.0)


def read_shape_clip(frames: np.ndarray) -> ShapeReading:
    """Read colour, shape and direction off a clip, uint8 (T, H, W, 3) or float in [0, 1], square, T >= 2.

    A shape has to be there in seven of eight frames. Raises ValueError for other arrays.
    """
    video = _checked(frames)
    side = video.shape[1]
    bright = video.max(axis=3) > FOREGROUND
    areas = bright.mean(axis=(1, 2))
    times = np.flatnonzero((areas >= MIN_AREA) & (areas <= MAX_AREA))
    if not _enough(times, video):
        return _NOTHING
    ink = _ink(video[times], bright[times])
    coverage = _coverage(video[times], ink, np.median(video[times][~bright[times]], axis=0))
    same = coverage.mean(axis=(1, 2)) >= MIN_AREA / 2  # a frame whose foreground has another colour covers nothing
    times, coverage = times[same], coverage[same]
    if not _enough(times, video):
        return _NOTHING
    centres = _centres(coverage)
    colour, colour_margin = _colour(ink)
    direction, direction_margin, travel = _direction(times, centres / side, len(video))
    shape, shape_margin, error = _shape(coverage, centres)
    return ShapeReading(colour, shape, direction, colour_margin, shape_margin, direction_margin, travel, error)


def _checked(frames: np.ndarray) -> np.ndarray:
    """Float64 in [0, 1]."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.shape[0] < 2 or frames.shape[1] != frames.shape[2]:
        raise ValueError(f"read_shape_clip: frames: expected shape (T, S, S, 3) with T >= 2, got {frames.shape}")
    if frames.dtype == np.uint8:
        return frames / 255
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"read_shape_clip: frames: expected uint8 or floats in [0, 1], got {frames.dtype}")
    return np.clip(frames.astype(np.float64), 0.0, 1.0)


def _enough(times: np.ndarray, video: np.ndarray) -> bool:
    """Whether these frames are nearly all."""
    return len(times) >= max(2, MIN_SHOWN * len(video))


def _ink(video: np.ndarray, bright: np.ndarray) -> np.ndarray:
    """The shape's colour: the median over the foreground that is surrounded by foreground, RGB (3,)."""
    inner = bright.copy()
    inner[:, 1:] &= bright[:, :-1]
    inner[:, :-1] &= bright[:, 1:]
    inner[:, :, 1:] &= bright[:, :, :-1]
    inner[:, :, :-1] &= bright[:, :, 1:]
    return np.median(video[inner if inner.any() else bright], axis=0)


def _coverage(video: np.ndarray, ink: np.ndarray, background: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, (T, S, S) in [0, 1]: by its place between background and ink."""
    axis = ink - background
    coverage = np.clip((video - background) @ axis / max(axis @ axis, 1e-6), 0.0, 1.0)
    return coverage * _near(coverage > 0.5)  # stray bright pixels of a light background are far from the ink


def _near(bright: np.ndarray) -> np.ndarray:
    """The foreground and the pixels beside it, which it may cover in part."""
    near = bright.copy()
    for axis in (1, 2):
        grown = near.copy()
        head, tail = [slice(None)] * 3, [slice(None)] * 3
        head[axis], tail[axis] = slice(1, None), slice(None, -1)
        grown[tuple(head)] |= near[tuple(tail)]
        grown[tuple(tail)] |= near[tuple(head)]
        near = grown
    return near


def _centres(coverage: np.ndarray) -> np.ndarray:
    """Centre of mass of every frame, in pixels from the upper left corner, (T, 2) as x, y."""
    pixels = np.arange(coverage.shape[1]) + 0.5
    total = coverage.sum(axis=(1, 2))
    return np.stack([coverage.sum(axis=1) @ pixels / total, coverage.sum(axis=2) @ pixels / total], axis=1)


def _colour(ink: np.ndarray) -> tuple[str | None, float]:
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names]) / 255
    distances = np.linalg.norm(palette[:, None] * SHADES[:, None] - ink, axis=2).min(axis=1)
    best, second = np.argsort(distances)[:2]
    margin = float(1 - distances[best] / distances[second])
    return (names[best] if distances[best] <= MAX_COLOUR_DISTANCE else None), margin


def _direction(times: np.ndarray, centres: np.ndarray, frames: int) -> tuple[str | None, float, tuple[float, float]]:
    """The way of a straight line through the centres, which are shares of the frame's side."""
    slopes = np.polyfit(times, centres, 1)[0]
    travel = slopes * (frames - 1)
    along, across = np.sort(np.abs(travel))[::-1]
    margin = float(1 - across / along) if along > 0 else 0.0
    moved = {name: float(np.dot(step, travel)) for name, step in DIRECTIONS.items()}
    name = max(moved, key=moved.__getitem__)
    clear = along >= MIN_TRAVEL and across <= MAX_SIDEWAYS * along
    return (name if clear else None), margin, (float(travel[0]), float(travel[1]))


def _shape(coverage: np.ndarray, centres: np.ndarray) -> tuple[str | None, float, float]:
    """The outline that differs least from the coverage (T, S, S), drawn with its centre of mass at each centre."""
    side = coverage.shape[1]
    pixels = np.arange(side) + 0.5
    # A window around the centre is enough; what lies outside of it counts against every outline alike.
    reach = int(np.ceil(RADII[-1] * side)) + 2
    window = np.arange(-reach, reach + 1)
    corner = np.floor(centres).astype(int)
    columns, rows = (np.clip(corner[:, axis, None] + window, 0, side - 1) for axis in (0, 1))
    seen = coverage[np.arange(len(coverage))[:, None, None], rows[:, :, None], columns[:, None, :]]
    x, y = pixels[columns] - centres[:, :1], pixels[rows] - centres[:, 1:]
    errors = {
        shape: min(
            _outline_error(shape, radius * side, seen, x + dx, y + dy) for dx in REFINED for dy in REFINED
            for radius in _radii(shape, seen, side)
        )
        for shape in SHAPES
    }  # fmt: skip
    best, second = sorted(errors, key=errors.__getitem__)[:2]
    margin = 1 - errors[best] / errors[second] if errors[second] > 0 else 0.0
    return (best if errors[best] <= MAX_SHAPE_ERROR else None), margin, errors[best]


def _radii(shape: str, seen: np.ndarray, side: int) -> np.ndarray:
    """The sizes of an outline whose area is near the one seen."""
    unit_area = _field(shape)[2]
    radius = np.sqrt(seen.sum(axis=(1, 2)).mean() / unit_area) / side
    return np.clip(radius * np.array([0.92, 1.0, 1.08]), RADII[0], RADII[-1])


def _outline_error(shape: str, radius: float, seen: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Squared difference of an outline from what is seen, over the outline's square; x, y pixels from its centre."""
    field, centroid, _ = _field(shape)
    step = FIELD_SIDE / (2 * FIELD_REACH)
    column, row = (
        np.clip(((each / radius + offset + FIELD_REACH) * step).astype(int), 0, FIELD_SIDE - 1)
        for each, offset in ((x, centroid[0]), (y, centroid[1]))
    )
    drawn = np.clip(0.5 - field[row[:, :, None], column[:, None, :]] * radius, 0.0, 1.0)
    return float(np.square(drawn - seen).sum() / np.square(drawn).sum())


@functools.cache
def _field(shape: str) -> tuple[np.ndarray, tuple[float, float], float]:
    """Signed distances from an outline of radius 1 on a grid, its centre of mass (x, y), and its area."""
    axis = (np.arange(FIELD_SIDE) + 0.5) * (2 * FIELD_REACH / FIELD_SIDE) - FIELD_REACH
    field = signed_distance(OUTLINES[shape], axis[None, :], axis[:, None])
    inside = field < 0
    rows, columns = np.nonzero(inside)
    return field, (float(axis[columns].mean()), float(axis[rows].mean())), inside.sum() * (axis[1] - axis[0]) ** 2
