"""The command line: files that open, and one-line errors with exit code 2."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fastvdiff import __version__
from fastvdiff.cli import app
from fastvdiff.data import read_video
from fastvdiff.sampling import TextToVideoPipeline
from tests.small_run import FRAMES, SIZE, small_pipeline, write_clips, write_config

Run = Callable[..., Result]
PROMPT = "a red circle moving right"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "small"
    small_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("data") / "shapes", clips=4)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(each) for each in arguments])


def assert_refused(result: Result, message: str) -> None:
    """One line on stderr that opens with the message, exit code 2, and no traceback."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2, result.output
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in result.output


class TestSample:
    def test_mp4(self, run: Run, checkpoint: Path, tmp_path: Path) -> None:
        result = run("sample", PROMPT, "-o", "out.mp4", "--checkpoint", checkpoint, "--steps", 2, "--seed", 7)
        assert result.exit_code == 0, result.output
        size = f"{SIZE}x{SIZE}, every pixel 32x32,"
        assert result.stdout == f"out.mp4: {FRAMES} frames of {size} at 8 fps, seed 7\n"
        video = read_video(tmp_path / "out.mp4")
        assert (tuple(video.frames.shape), video.fps) == ((FRAMES, 32 * SIZE, 32 * SIZE, 3), pytest.approx(8))

    def test_gif_and_sheet(self, run: Run, checkpoint: Path, tmp_path: Path) -> None:
        for name in ("out.gif", "out.PNG"):
            result = run("sample", PROMPT, "-o", name, "--checkpoint", checkpoint, "--steps", 2, "--fps", 4)
            assert result.exit_code == 0, result.output
        with Image.open(tmp_path / "out.gif") as gif, Image.open(tmp_path / "out.PNG") as sheet:
            assert gif.n_frames > 1
            assert sheet.width > sheet.height

    def test_a_drawn_seed_can_be_repeated(self, run: Run, checkpoint: Path, tmp_path: Path) -> None:
        options = ("--checkpoint", checkpoint, "--steps", 2, "--guidance", 2, "--eta", 1, "--negative-prompt", "dull")
        first = run("sample", PROMPT, "-o", "a.png", *options)
        seed = re.search(r"seed (\d+)$", first.stdout)[1]
        assert run("sample", PROMPT, "-o", "b.png", *options, "--seed", seed).exit_code == 0
        np.testing.assert_array_equal(Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png"))

    def test_other_sizes_are_noted(self, run: Run, checkpoint: Path, tmp_path: Path) -> None:
        options = ("--checkpoint", checkpoint, "--steps", 1, "--num-frames", 3, "--size", "15x10")
        result = run("sample", PROMPT, "-o", "out.mp4", *options)
        assert result.exit_code == 0, result.output
        note = f"Note: the model was trained on {FRAMES} frames of {SIZE}x{SIZE}; 3 of 15x10 may look worse."
        assert note in result.stderr
        assert tuple(read_video(tmp_path / "out.mp4").frames.shape) == (3, 17 * 10, 17 * 15, 3)  # enlarged to be seen
        assert "Note" not in run("sample", PROMPT, "-o", "b.png", "--checkpoint", checkpoint, "--steps", 1).stderr

    def test_implementation(self, run: Run, checkpoint: Path, tmp_path: Path) -> None:
        options = ("--checkpoint", checkpoint, "--steps", 2, "--seed", 1)
        assert run("sample", PROMPT, "-o", "a.png", *options, "--impl", "reference").exit_code == 0
        assert run("sample", PROMPT, "-o", "b.png", *options).exit_code == 0
        a, b = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a.png", "b.png"))
        assert np.abs(a - b).max() <= 1
        assert_refused(run("sample", PROMPT, "-o", "c.png", *options, "--impl", "magic"), "magic")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((" ", "-o", "out.mp4"), "PROMPT: expected some text, got an empty one"),
            ((PROMPT, "-o", "out.avi"), r"--output: expected a name ending in \.mp4, \.gif, \.png, got 'out\.avi'"),
            ((PROMPT, "-o", "out"), "--output: expected a name ending in"),
            ((PROMPT, "-o", "no/where/out.mp4"), "--output: the folder no/where does not exist"),
            ((PROMPT, "-o", "out.mp4", "--size", "big"), "--size: expected WIDTHxHEIGHT or one number, .*got 'big'"),
            ((PROMPT, "-o", "out.mp4", "--size", "0x8"), "--size: expected sides of at least 1, got 0x8"),
            ((PROMPT, "-o", "out.mp4", "--size", "-4"), "--size: expected WIDTHxHEIGHT"),
            ((PROMPT, "-o", "out.mp4", "--num-frames", "0"), "--num-frames: expected at least 1, got 0"),
            ((PROMPT, "-o", "out.mp4", "--steps", "0"), "--steps: expected at least 1, got 0"),
            ((PROMPT, "-o", "out.mp4", "--guidance", "-1"), "--guidance: expected a number from 0 upward, got -1"),
            ((PROMPT, "-o", "out.mp4", "--eta", "nan"), "--eta: expected a number from 0 upward, got nan"),
            ((PROMPT, "-o", "out.mp4", "--seed", "-1"), "--seed: expected at least 0, got -1"),
            ((PROMPT, "-o", "out.mp4", "--fps", "0"), "--fps: expected a positive number, got 0"),
            ((PROMPT, "-o", "out.mp4", "--checkpoint", "nope"), "nope: no such checkpoint folder; in the package: "),
            ((PROMPT, "-o", "out.mp4", "--checkpoint", "."), r"\.: holds no fastvdiff\.json: not a fastvdiff pipeline"),
        ],
    )
    def test_mistakes(self, run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
        assert_refused(run("sample", *arguments), message)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--steps", "5000", "num_inference_steps: expected at most 1000"),
            (
                "--size",
                "100000",
                r"--size, --num-frames: expected at most 268,435,456 pixels in all, got 40,000,000,000",
            ),
            ("--fps", "80", "fps: a GIF plays at most 50 frames a second"),
        ],
    )
    def test_mistakes_that_the_model_shows(
        self, run: Run, checkpoint: Path, tmp_path: Path, option: str, value: str, message: str
    ) -> None:
        options = ("--steps", "1", option, value) if option != "--steps" else (option, value)
        assert_refused(run("sample", PROMPT, "-o", "out.gif", "--checkpoint", checkpoint, *options), message)
        assert list(tmp_path.iterdir()) == []

    def test_truncated_checkpoint(self, run: Run, tmp_path: Path) -> None:
        small_pipeline().save_pretrained(tmp_path / "broken")
        weights = tmp_path / "broken" / "unet" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        result = run("sample", PROMPT, "-o", "out.mp4", "--checkpoint", "broken")
        assert_refused(result, r"broken/unet/model\.safetensors: truncated or altered: expected .* bytes, found")

    def test_output_that_is_a_folder(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "out.mp4").mkdir()
        assert_refused(run("sample", PROMPT, "-o", "out.mp4"), r"--output: out\.mp4 is a folder")


class TestShapes:
    def test_writes_a_data_set(self, run: Run, tmp_path: Path) -> None:
        arguments = (
            "data",
            "shapes",
            "some/shapes",
            "--clips",
            2,
            "--frames",
            3,
            "--size",
            12,
            "--fps",
            5,
            "--seed",
            3,
        )
        for _ in range(2):
            result = run(*arguments)
            assert result.exit_code == 0, result.output
            assert result.stdout == "some/shapes: 2 clips of 3 frames, 12x12 at 5 fps, seed 3\n"
        description = json.loads((tmp_path / "some" / "shapes" / "dataset.json").read_text())
        assert (description["clips"], description["seed"], description["fps"]) == (2, 3, 5)
        assert_refused(run(*arguments[:-1], 4), "holds a data set of other parameters")

    def test_mistakes(self, run: Run, tmp_path: Path) -> None:
        assert_refused(run("data", "shapes", "x", "--clips", 0), "clips: expected at least 1, got 0")
        assert_refused(run("data", "shapes", "x", "--size", 4), "size: expected at least 8, got 4")
        (tmp_path / "file").write_text("")
        assert_refused(run("data", "shapes", "file"), "file is a file; a data set needs a folder")


class TestTrain:
    @pytest.fixture
    def config(self, tmp_path: Path, clips: Path) -> Path:
        return write_config(tmp_path / "small.toml", clips, tmp_path / "run")

    def test_from_clips_to_a_video(self, run: Run, config: Path, tmp_path: Path) -> None:
        result = run("train", config, "--output.sample_every=2", "--output.sample_prompts", '["a red circle"]')
        assert result.exit_code == 0, result.output
        assert f"4 clips, {FRAMES} frames of {SIZE}x{SIZE}; unet 0." in result.stdout
        folder = tmp_path / "run"
        assert {path.name for path in folder.iterdir()} == {
            ".lock", "checkpoint-00000002", "checkpoint-00000004", "config.toml", "log.jsonl", "pipeline", "samples",
        }  # fmt: skip
        for step in (2, 4):
            assert Image.open(folder / "samples" / f"step-{step:08d}.png").width > FRAMES * SIZE
        assert run("sample", PROMPT, "-o", "out.mp4", "--checkpoint", folder / "pipeline", "--steps", 2).exit_code == 0

        resumed = run("train", config, "--run.steps=6", "--resume_from_checkpoint", "latest")
        assert resumed.exit_code == 0, resumed.output
        assert f"resuming from {folder}/checkpoint-00000004" in resumed.stdout
        assert "resuming with other values than before for run.steps" in resumed.output

        assert run("export", folder, "exported").stdout.startswith("exported: the averaged weights of step 6, ")
        prompts = json.loads((tmp_path / "exported" / "fastvdiff.json").read_text())["prompts"]
        assert prompts["direction"] == ["right", "left", "up", "down"]
        left, right = (TextToVideoPipeline.from_pretrained(at).unet for at in (folder / "pipeline", "exported"))
        assert all((a == b).all() for a, b in zip(left.parameters(), right.parameters(), strict=True))

    def test_resume_before_the_first_checkpoint(self, run: Run, config: Path) -> None:
        result = run("train", config, "--resume_from_checkpoint", "latest", "--run.steps=2")
        assert result.exit_code == 0, result.output
        assert "no checkpoint in" in result.stdout
        assert_refused(run("train", config), r"run: already holds checkpoint-00000002; go on with --resume_from_check")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ("--optimizer.lrr=1",),
                r"--optimizer\.lrr=1: optimizer\.lrr: unknown key; did you mean 'optimizer\.lr'\?",
            ),
            (("--optimizer.lr",), r"--optimizer\.lr: expected a value, as in --optimizer\.lr=value"),
            (("more",), "more: unexpected argument; overrides have the form --section.key=value"),
            (("--data.folder=none/such",), "none/such: no such folder"),
            (("--run.batch_size=50",), r"expected 1 <= batch_size <= n, got batch_size=50 and n=4"),
            (("--data.num_frames=9",), r"000\.mp4: too short: 9 frames"),
            (("--resume_from_checkpoint", "checkpoint-7"), "checkpoint-7: no such checkpoint; in .*run: none"),
        ],
    )
    def test_mistakes(self, run: Run, config: Path, arguments: tuple[str, ...], message: str) -> None:
        assert_refused(run("train", config, *arguments), message)

    def test_configuration_mistakes(self, run: Run, tmp_path: Path) -> None:
        assert_refused(run("train", "missing.toml"), r"missing\.toml: no such configuration file")
        (tmp_path / "bad.toml").write_text("steps = \n")
        assert_refused(run("train", "bad.toml"), r"bad\.toml: not valid TOML")

    def test_export_mistakes(self, run: Run, tmp_path: Path) -> None:
        assert_refused(run("export", "nothing", "out"), "nothing: no such checkpoint folder")
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "file").write_text("mine")
        assert_refused(run("export", "nothing", "precious"), "precious: is not empty and holds no pipeline")


def test_help_names_every_command(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in ("sample", "train", "export", "data", "doctor", "verify", "tune"):
        assert name in result.stdout
    assert run("--version").stdout == f"{__version__}\n"


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from fastvdiff.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('torch' in sys.modules, end.code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    code = "from fastvdiff.cli import main; main()"
    arguments = [sys.executable, "-c", code, "sample", "", "-o", str(tmp_path / "out.mp4")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "Error: PROMPT: expected some text, got an empty one\n",
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_so(tmp_path: Path, clips: Path, number: int) -> None:
    """The whole group gets the signal, as from a terminal or a scheduler; the worker leaves it to training."""
    config = write_config(tmp_path / "small.toml", clips, tmp_path / "run", steps=100_000)
    code = "from fastvdiff.cli import main; main()"
    arguments = [sys.executable, "-c", code, "train", str(config), "--data.workers=1", "--output.log_every=1"]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    saved = re.search(r"interrupted: step (\d+) of 100000 is saved in .*; go on with --resume_from_checkpoint", stdout)
    assert int(saved[1]) == json.loads(log.read_text().splitlines()[-1])["step"]
    assert (tmp_path / "run" / f"checkpoint-{int(saved[1]):08d}" / "manifest.json").is_file()
    assert "Traceback" not in stderr


class TestSwap:
    @pytest.mark.parametrize(
        ("model", "replaced"),
        [("AutoencoderKLTemporalDecoder", "TemporalResnetBlock"), ("AutoencoderKL", "ResnetBlock2D")],
    )
    def test_a_model_is_built_swapped_and_verified(self, run: Run, tmp_path: Path, model: str, replaced: str) -> None:
        (tmp_path / "config.json").write_text(
            json.dumps({"block_out_channels": [32], "layers_per_block": 1, "sample_size": 8})
        )
        result = run("swap", "--model", model, "--config", "config.json", "--frames", 2, "--size", 8)
        assert result.exit_code == 0, result.output
        assert f"modules replaced in {model}" in result.output
        assert replaced in result.output
        assert "passed" in result.output

    def test_mistakes_are_one_line(self, run: Run, tmp_path: Path) -> None:
        assert_refused(run("swap", "--model", "NoSuchModel"), "diffusers has none of that name")
        assert_refused(run("swap", "--model", "nowhere.Model"), "No module named 'nowhere'")
        (tmp_path / "bad.json").write_text("[1]")
        assert_refused(run("swap", "--model", "UNetMotionModel", "--config", "bad.json"), "expected a JSON object")
        (tmp_path / "odd.json").write_text('{"block_out_channels": [3]}')
        assert_refused(
            run("swap", "--model", "UNet3DConditionModel", "--config", "odd.json"), "cannot be built from odd.json"
        )
