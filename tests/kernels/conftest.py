"""Where the Triton kernels' tests run: on the GPU, else on the CPU under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """The device of the tensors."""
    return "cuda" if torch.cuda.is_available() else "cpu"
