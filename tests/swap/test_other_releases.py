"""The swap's tests on libraries that the test environment does not have, each set in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What was current in October 2025, with the transformers, hub and peft of that time.
YEAR_OLD = (
    "diffusers==0.35.2", "transformers==4.57.1", "huggingface_hub==0.36.0", "tokenizers==0.22.1", "accelerate==1.11.0",
    "peft==0.17.1",
)  # fmt: skip
# video-diffusion-pytorch normalises over groups up to 0.6, and over channels from 0.7 on.
NEVER_INSTALLED = (
    "monai==1.6.1", "imagen-pytorch==2.1.0", "rotary-embedding-torch==0.9.1", "einops-exts==0.0.4",
)  # fmt: skip
TESTS = Path(__file__).parent


def _beside(folder: Path, *libraries: str) -> dict[str, str]:
    """An environment in which `libraries`, and nothing that they ask for, are found before what is installed."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *libraries]
    subprocess.run(pip, check=True)
    return {**os.environ, "PYTHONPATH": str(folder)}


def _run(environment: dict[str, str], *arguments: str) -> str:
    """What Python prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=TESTS.parents[1], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _tested(environment: dict[str, str], *options: str) -> str:
    return _run(environment, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *options, str(TESTS))


@pytest.mark.long
def test_libraries_of_a_year_ago(tmp_path: Path) -> None:
    """More than a quarter of an hour on a busy machine, and a package index within reach."""
    environment = _beside(tmp_path, *YEAR_OLD)
    program = "import diffusers, peft; print(diffusers.__version__, peft.__version__)"
    assert _run(environment, "-c", program).split() == ["0.35.2", "0.17.1"]
    _tested(environment, "-m", "not long")


@pytest.mark.long
@pytest.mark.parametrize("release", ["0.6.0", "0.7.0"])
def test_libraries_that_are_not_installed(release: str, tmp_path: Path) -> None:
    """MONAI, imagen-pytorch and `release` of video-diffusion-pytorch, without torchvision: half a minute."""
    environment = _beside(tmp_path, *NEVER_INSTALLED, f"video-diffusion-pytorch=={release}")
    printed = _tested(environment, "-m", "long or not long", "-k", "library_itself or pytorch_itself")
    assert "3 passed" in printed, printed
    assert "skipped" not in printed, printed
