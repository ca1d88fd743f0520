"""The swap's tests on the libraries of a year ago, in an environment of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What was current in October 2025, with the transformers, hub and peft of that time.
LIBRARIES = (
    "diffusers==0.35.2", "transformers==4.57.1", "huggingface_hub==0.36.0", "tokenizers==0.22.1", "accelerate==1.11.0",
    "peft==0.17.1",
)  # fmt: skip
TESTS = Path(__file__).parent


@pytest.mark.long
def test_libraries_of_a_year_ago(tmp_path: Path) -> None:
    """Seven minutes, and a package index within reach."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), *LIBRARIES]
    subprocess.run(pip, check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    program = "import diffusers, peft, transformers; print(diffusers.__version__, peft.__version__)"
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert found == ["0.35.2", "0.17.1"]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not long", str(TESTS)]
    subprocess.run(tests, env=environment, cwd=TESTS.parents[1], check=True)
