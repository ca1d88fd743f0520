"""The scripts in examples/, on tiny configurations; without the marked lines they give the same numbers."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

import fastvdiff

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["train_video_unet", "animatediff"])
def test_the_line_is_marked(name: str) -> None:
    marked = [line for line in (EXAMPLES / f"{name}.py").read_text().splitlines() if "# <-- " in line]
    assert all(re.search(r"fastvdiff\.swap_(kernels|scheduler)\(", line) for line in marked)
    assert "swap_kernels" in marked[0]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_training_with_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("train_video_unet")
    options = ["--steps=3", "--batch-size=2", "--frames=3", "--size=8", "--channels", "16", "32"]
    losses = example.main([*options, f"--output={tmp_path / 'swapped'}"])
    saved = diffusers.UNet3DConditionModel.from_pretrained(tmp_path / "swapped")
    assert saved.config.block_out_channels == [16, 32] or saved.config.block_out_channels == (16, 32)
    monkeypatch.setattr(fastvdiff, "swap_kernels", lambda unet: "left alone")
    assert losses == pytest.approx(example.main([*options, f"--output={tmp_path / 'eager'}"]), rel=1e-3)


def test_animatediff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("animatediff")
    options = ["noise", "--tiny", "--frames=3", "--size=16", "--steps=2"]
    frames = example.main([*options, "-o", str(tmp_path / "swapped.gif")])
    assert len(frames) == 3
    printed = capsys.readouterr().out
    assert "AnimateDiffTransformer3D" in printed
    assert "DDIMScheduler" in printed
    for name in ("swap_kernels", "swap_scheduler"):
        monkeypatch.setattr(fastvdiff, name, lambda model: "left alone")
    eager = example.main([*options, "-o", str(tmp_path / "eager.gif")])
    for a, b in zip(frames, eager, strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1
