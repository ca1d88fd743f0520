"""Synthetic clips: what the caption says is what moves, and a data set is its parameters."""

import itertools
import json

import numpy as np
import pytest

from fastvdiff.data import caption, read_video, render_clip, sample_spec, write_shapes
from fastvdiff.data.shapes import BACKGROUNDS, CAPTIONS, COLOURS, DIRECTIONS, EXAMPLE, SHAPES, choose_held_out


def centroids(frames: np.ndarray, colour: str) -> np.ndarray:
    """Centre (T, 2) as (x, y), in fractions of the side, of the pixels near a colour."""
    near = np.abs(frames.astype(int) - np.array(COLOURS[colour])).sum(-1) < 100
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]] + 0.5
    return np.stack([(near * x).sum((1, 2)), (near * y).sum((1, 2))], 1) / near.sum((1, 2))[:, None] / frames.shape[1]


@pytest.mark.parametrize("size", [32, 64])
def test_the_shape_moves_where_the_caption_says(size):
    for index in range(200):
        spec = sample_spec(3, index)
        path = centroids(render_clip(spec, 16, size), spec.colour)
        step = np.array(DIRECTIONS[spec.direction])
        assert (path[-1] - path[0]) @ step == pytest.approx(spec.travel, abs=0.03), spec
        assert (path[-1] - path[0]) @ step > 0.4, spec
        assert np.ptp(path @ step[::-1]) < 0.03, spec
        assert (np.diff(path @ step) > 0).all(), spec
        assert spec.direction in caption(spec)


def test_the_shape_stays_whole_and_uniform():
    for index in range(200):
        spec = sample_spec(5, index)
        start, step = np.array(spec.start), np.array(DIRECTIONS[spec.direction])
        for centre in (start, start + spec.travel * step):
            assert (centre > spec.radius).all(), spec
            assert (centre < 1 - spec.radius).all(), spec


def test_the_shape_has_its_colour_and_stands_out():
    for index in range(100):
        spec = sample_spec(6, index)
        frame = render_clip(spec, 2, 64)[0].astype(int)
        x, y = (int(64 * value) for value in spec.start)
        distances = {name: np.abs(frame[y, x] - np.array(rgb)).sum() for name, rgb in COLOURS.items()}
        assert min(distances, key=distances.get) == spec.colour
        assert frame[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 140
        assert np.abs(frame[y, x] - np.median(frame, axis=(0, 1))).max() > 60


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_filled_and_smooth(shape):
    spec = next(s for s in (sample_spec(0, k) for k in itertools.count()) if s.shape == shape)
    frame = render_clip(spec, 1, 128)[0].astype(float)
    background = render_clip(spec, 16, 128)[-1].astype(float)
    area = (np.abs(frame - background).sum(-1) > 90).mean() / 2  # both positions differ
    assert 0.25 < area / (np.pi * spec.radius**2) < 1.05


def test_clips_depend_on_seed_and_index_only():
    assert sample_spec(1, 2) == sample_spec(1, 2)
    assert len({sample_spec(seed, index) for seed in range(4) for index in range(50)}) == 200
    np.testing.assert_array_equal(render_clip(sample_spec(1, 2), 4, 32), render_clip(sample_spec(1, 2), 4, 32))


def test_every_combination_and_caption_occurs():
    specs = [sample_spec(0, index) for index in range(4000)]
    assert len({spec.combination for spec in specs}) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS)
    assert {spec.variant for spec in specs} == set(range(len(CAPTIONS)))
    assert 0.5 < np.mean([caption(spec) == caption(spec, 0) for spec in specs]) < 0.7


def test_captions_read_well():
    specs = {spec.combination: spec for spec in (sample_spec(0, index) for index in range(4000))}
    assert caption(specs[EXAMPLE], 0) == "a red circle moving right"
    assert caption(specs["orange", "star", "up"], 0) == "an orange star moving up"
    assert caption(specs["blue", "square", "left"], 2) == "a blue square moving to the left"
    with pytest.raises(ValueError, match="variant: expected 0 to 4, got 5"):
        caption(specs[EXAMPLE], 5)


def test_held_out_combinations_never_occur():
    held_out = choose_held_out(0, 0.15)
    assert len(held_out) == pytest.approx(0.15 * 192, abs=1)
    assert ("red", "circle", "right") not in held_out
    mirrored = {"left": "right", "right": "left"}
    assert {(c, s, mirrored.get(d, d)) for c, s, d in held_out} == set(held_out)
    assert held_out != choose_held_out(1, 0.15)
    assert choose_held_out(0, 0) == []
    seen = {sample_spec(0, index, held_out=frozenset(held_out)).combination for index in range(3000)}
    assert seen.isdisjoint(held_out)
    assert len(seen) == 192 - len(held_out)
    with pytest.raises(ValueError, match=r"held_out: expected a fraction in \[0, 1\), got 1"):
        choose_held_out(0, 1)


def test_backgrounds_on_request():
    kinds = {sample_spec(0, index, backgrounds=("solid", "noise")).background.kind for index in range(40)}
    assert kinds == {"solid", "noise"}
    assert {sample_spec(0, index).background.kind for index in range(40)} == set(BACKGROUNDS)
    plain = [sample_spec(0, index, backgrounds=("plain",)) for index in range(2)]
    assert plain[0].background == plain[1].background
    assert plain[0].combination == sample_spec(0, 0).combination
    corners = {tuple(render_clip(spec, 2, 32)[0, 0, 0]) for spec in plain}
    assert corners == {(31, 31, 36)}


def test_a_written_data_set(tmp_path):
    calls = []
    description = write_shapes(
        tmp_path / "d", clips=6, num_frames=8, size=32, fps=8, seed=4, held_out=0.1, progress=lambda *a: calls.append(a)
    )
    assert calls == [(k, 6) for k in range(1, 7)]
    assert json.loads((tmp_path / "d/dataset.json").read_text()) == description
    lines = [json.loads(line) for line in (tmp_path / "d/captions.jsonl").read_text().splitlines()]
    held_out = frozenset(map(tuple, description["held_out"]))
    for index, line in enumerate(lines):
        spec = sample_spec(4, index, held_out=held_out)
        assert line == {
            "file": f"clips/{index:06d}.mp4",
            "caption": caption(spec),
            "colour": spec.colour,
            "shape": spec.shape,
            "direction": spec.direction,
        }
        video = read_video(tmp_path / "d" / line["file"])
        assert video.fps == pytest.approx(8)
        error = video.frames.numpy().astype(float) - render_clip(spec, 8, 32)
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 38
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"clips", "captions.jsonl", "dataset.json"}


def test_writing_again_changes_nothing_and_an_interrupted_set_is_completed(tmp_path):
    options = {"clips": 3, "num_frames": 4, "size": 16}
    write_shapes(tmp_path, **options)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    write_shapes(tmp_path, **options, progress=lambda *a: pytest.fail("rendered again"))
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()} == before

    (tmp_path / "captions.jsonl").unlink()
    (tmp_path / "clips/000001.mp4").write_bytes(b"half")
    write_shapes(tmp_path, **options)
    assert {path: path.read_bytes() for path in before} == {path: data for path, (_, data) in before.items()}


def test_write_shapes_refuses(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="is not empty and holds no shapes data set"):
        write_shapes(tmp_path, clips=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(FileExistsError, match=r"mine.txt is a file"):
        write_shapes(tmp_path / "mine.txt", clips=1)
    with pytest.raises(FileNotFoundError, match=r"the folder .*no does not exist"):
        write_shapes(tmp_path / "no" / "d", clips=1)
    write_shapes(tmp_path / "d", clips=1, num_frames=2, size=16)
    with pytest.raises(FileExistsError, match=r"holds a data set of other parameters \(see .*dataset.json\)"):
        write_shapes(tmp_path / "d", clips=1, num_frames=2, size=16, seed=1)
    for name, value in (("clips", 0), ("num_frames", 0), ("size", 7), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name}: expected at least .*, got {value}"):
            write_shapes(tmp_path / "e", **{"clips": 1, name: value})
    for backgrounds in ((), ("solid", "sky"), ("solid", "solid")):
        with pytest.raises(ValueError, match=r"backgrounds: expected different ones of solid, .*plain, got"):
            write_shapes(tmp_path / "e", clips=1, backgrounds=backgrounds)
    with pytest.raises(ValueError, match="held_out: expected a fraction"):
        write_shapes(tmp_path / "e", clips=1, held_out=1.5)
    assert not (tmp_path / "e").exists()
