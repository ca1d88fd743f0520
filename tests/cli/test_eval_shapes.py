"""`fastvdiff eval shapes`: prompts that training did not show, and counts that agree with the pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fastvdiff.cli import app
from fastvdiff.cli.eval_shapes import choose_prompts
from fastvdiff.data.shapes import (
    CAPTIONS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    choose_held_out,
    describe,
    render_clip,
    sample_spec,
)
from fastvdiff.sampling import TextToVideoPipeline
from tests.small_run import small_pipeline

HELD_OUT = choose_held_out(0, 0.1)
GRAMMAR = {"shape": list(SHAPES), "held_out": HELD_OUT}
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["eval", "shapes", *map(str, arguments)])


def save(folder: Path, prompts: dict[str, Any]) -> Path:
    small_pipeline().save_pretrained(folder, prompts=prompts)
    return folder


def answer_with(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, tuple[str, str, str]], dict[str, str]]) -> None:
    """Replace sampling by drawn clips of what the prompt names, but for what `change` says of a seed."""
    meanings = {
        describe((colour, shape, direction), variant): (colour, shape, direction)
        for colour in COLOURS for shape in SHAPES for direction in DIRECTIONS for variant in range(len(CAPTIONS))
    }  # fmt: skip
    places = {sample_spec(3, index).direction: sample_spec(3, index) for index in range(30)}

    def call(self: TextToVideoPipeline, prompts: list[str], *, seed: int, **options: Any) -> SimpleNamespace:
        clips = []
        for position, prompt in enumerate(prompts, seed):
            colour, shape, direction = meanings[prompt]
            shown = {"colour": colour, "shape": shape, "direction": direction, **change(position, meanings[prompt])}
            clips.append(render_clip(replace(places[shown["direction"]], **shown), 16, 32) / 255)
        return SimpleNamespace(frames=np.stack(clips))

    monkeypatch.setattr(TextToVideoPipeline, "__call__", call)


def test_counts_are_those_of_the_pixels(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {10: {"colour": "white"}, 11: {"direction": "up"}, 12: {"direction": "up", "shape": "star"}}
    for seed, wrong in changes.items():  # a change that happens to be what the prompt names would be none
        named = dict(zip(("colour", "shape", "direction"), sorted(HELD_OUT)[seed - 10], strict=True))
        assert all(named[key] != value for key, value in wrong.items())
    answer_with(monkeypatch, lambda seed, _: changes.get(seed, {}))
    options = ("--prompts", 20, "--seed", 10, "--sheet", "sheet.png", "--json", "out.json")
    result = run("--checkpoint", save(tmp_path / "p", GRAMMAR), *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert {name: values["right"] for name, values in report["accuracy"].items()} == {
        "colour": 19, "shape": 19, "direction": 18, "all three": 17,
    }  # fmt: skip
    assert report["accuracy"]["direction"]["share"] == 0.9
    assert report["accuracy"]["direction"]["interval_95"] == pytest.approx([0.699, 0.972], abs=1e-3)
    assert (report["prompts"], report["videos"], len(report["readings"])) == ("held out of training", 20, 20)
    assert report["readings"][2]["shown"]["shape"] == "star"
    assert "18 of 20" in result.stdout
    assert "69.9% to 97.2%" in result.stdout
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (sheet.width, sheet.height) == (4 * (6 * 64 + 16), 5 * (64 + 16))
        red = np.asarray(sheet).reshape(5, 80, 4, 400, 3)[:, 64:]  # the lines below the frames
        marked = ((red[..., 0] > 200) & (red[..., 1] < 80)).any(axis=(1, 3))
    assert np.flatnonzero(marked).tolist() == [0, 1, 2]


def test_a_real_pipeline_is_sampled_as_asked(run: Run, tmp_path: Path) -> None:
    pipeline = save(tmp_path / "p", GRAMMAR)
    for seed, name in ((0, "a.json"), (0, "b.json"), (1, "c.json")):
        result = run("--checkpoint", pipeline, "--prompts", 3, "--steps", 2, "--seed", seed, "--json", name)
        assert result.exit_code == 0, result.output
    first, again, other = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json", "c.json"))
    assert first == again
    assert [reading["seed"] for reading in other["readings"]] == [1, 2, 3]
    assert [tuple(reading["named"].values()) for reading in first["readings"]] == sorted(HELD_OUT)[:3]


def test_prompts() -> None:
    held_out = frozenset(choose_held_out(0, 1 / 6))
    chosen = choose_prompts(held_out, 64, seen=False)
    assert len({prompt for prompt, _ in chosen}) == 64
    assert {combination for _, combination in chosen} == held_out
    assert chosen[0][0] == describe(min(held_out))
    seen = {combination for _, combination in choose_prompts(held_out, 160, seen=True)}
    assert len(seen) == 160
    assert not seen & held_out
    assert len(choose_prompts(held_out, 500, seen=False)) == 500


def test_a_model_that_saw_everything_says_so(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, lambda *_: {})
    result = run("--checkpoint", save(tmp_path / "p", {"shape": list(SHAPES)}), "--prompts", 2)
    assert result.exit_code == 0, result.output
    assert "Note: training saw every combination of colour, shape and direction: none was held out." in result.stderr
    assert "2 prompts seen in training" in " ".join(result.stdout.split())  # wherever the line breaks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", "0"), "--prompts: expected at least 1, got 0"),
        (("--steps", "0"), "--steps: expected at least 1, got 0"),
        (("--guidance", "nan"), "--guidance: expected a number from 0 upward, got nan"),
        (("--seed", "-1"), "--seed: expected at least 0, got -1"),
        (("--sheet", "sheet.jpg"), "--sheet: expected a name ending in .png, got 'sheet.jpg'"),
        (("--json", "no/where/out.json"), "--json: the folder no/where does not exist"),
        (("--checkpoint", "nope"), "nope: no such checkpoint folder"),
    ],
)
def test_mistakes(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert f"Error: {message}" in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_of_other_data_is_refused(run: Run, tmp_path: Path) -> None:
    result = run("--checkpoint", save(tmp_path / "p", {}))
    assert result.exit_code == 2
    assert "was not trained on `fastvdiff data shapes`" in result.stderr
