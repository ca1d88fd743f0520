"""The reader of moving shapes: near-perfect on true clips, and silent on what is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastvdiff.data.shapes import COLOURS, DIRECTIONS, MIRRORED, SHAPES, ShapeSpec, render_clip, sample_spec
from fastvdiff.metrics import ShapeReading, read_shape_clip

STILL = replace(sample_spec(0, 0), colour="red", shape="square", direction="right", travel=0.0, start=(0.5, 0.5))


def named(result: ShapeReading | ShapeSpec) -> tuple[str | None, str | None, str | None]:
    return result.colour, result.shape, result.direction


@pytest.mark.parametrize("noise", [0.0, 0.05], ids=["clean", "noisy"])
def test_true_clips_are_read_right(noise: float) -> None:
    """All backgrounds, sizes and places of the data set; the noise is more than a sampled clip has."""
    rng = np.random.default_rng(0)
    wrong = []
    for index in range(60):
        spec = sample_spec(5, index)
        clip = render_clip(spec, 16, 32) / 255 + noise * rng.standard_normal((16, 32, 32, 3))
        reading = read_shape_clip(clip)
        if named(reading) != named(spec):
            wrong.append((spec, reading))
        assert reading.travel == pytest.approx(np.multiply(DIRECTIONS[spec.direction], spec.travel), abs=0.06)
    assert len(wrong) <= 1, wrong


def test_every_colour_shape_and_direction_can_be_read() -> None:
    for kinds, field in ((COLOURS, "colour"), (SHAPES, "shape"), (DIRECTIONS, "direction")):
        for kind in kinds:
            spec = replace(STILL, start=(0.5, 0.5), travel=0.0) if field != "direction" else _moving(kind)
            reading = read_shape_clip(render_clip(replace(spec, **{field: kind}), 8, 32))
            assert getattr(reading, field) == kind
            assert getattr(reading, f"{field}_margin") > 0.5


def _moving(direction: str) -> ShapeSpec:
    step = DIRECTIONS[direction]
    return replace(STILL, direction=direction, travel=0.5, start=(0.5 - 0.25 * step[0], 0.5 - 0.25 * step[1]))


def test_a_mirrored_clip_moves_the_other_way_and_other_sizes_read_alike() -> None:
    for index in range(4):
        spec = sample_spec(6, index)
        for frames, side in ((8, 32), (16, 64), (4, 24)):
            clip = render_clip(spec, frames, side)
            assert named(read_shape_clip(clip)) == named(spec)
            assert read_shape_clip(clip[:, :, ::-1]).direction == MIRRORED[spec.direction]


def test_what_is_no_moving_shape_reads_as_none() -> None:
    nothing = ShapeReading(None, None, None, 0.0, 0.0, 0.0, (0.0, 0.0), 1.0)
    assert read_shape_clip(np.full((8, 32, 32, 3), 70, np.uint8)) == nothing
    assert read_shape_clip(np.full((8, 32, 32, 3), 230, np.uint8)) == nothing
    assert read_shape_clip(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)) == nothing
    half_gone = render_clip(_moving("right"), 8, 32)
    half_gone[4:] = half_gone[0, 0, 0]
    assert read_shape_clip(half_gone) == nothing
    flickering = render_clip(_moving("right"), 8, 32)
    for frame in flickering[::2]:
        frame[frame.max(axis=2) > 150] = (20, 240, 240)
    assert read_shape_clip(flickering) == nothing
    assert named(read_shape_clip(render_clip(STILL, 8, 32))) == ("red", "square", None)


def test_an_unclear_colour_shape_or_way_reads_as_none_alone() -> None:
    clip = render_clip(_moving("right"), 8, 32)
    other = render_clip(replace(_moving("right"), start=(0.25, 0.25)), 8, 32)
    two_squares = np.where(other.max(axis=3, keepdims=True) > 150, other, clip)
    reading = read_shape_clip(two_squares)
    assert (reading.colour, reading.shape) == ("red", None)
    pink = render_clip(_moving("down"), 8, 32)[..., [0, 1, 2]].copy()
    pink[pink.max(axis=3) > 150] = (255, 150, 190)
    reading = read_shape_clip(pink)
    assert (reading.colour, reading.direction) == (None, "down")
    diagonal = np.stack([np.roll(frame, k - 4, axis=0) for k, frame in enumerate(render_clip(_moving("right"), 8, 32))])
    assert named(read_shape_clip(diagonal)) == ("red", "square", None)


def test_other_arrays_are_refused() -> None:
    for shape in ((1, 32, 32, 3), (8, 32, 16, 3), (8, 32, 32), (8, 32, 32, 4)):
        with pytest.raises(ValueError, match=r"frames: expected shape \(T, S, S, 3\) with T >= 2, got"):
            read_shape_clip(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=r"frames: expected uint8 or floats in \[0, 1\], got int64"):
        read_shape_clip(np.zeros((8, 32, 32, 3), np.int64))
