"""The residual block on a GPU, its second norm taken along by the convolutions' CUDA kernels."""

from __future__ import annotations

import pytest
import torch

from fastvdiff import native
from tests.simt.test_resnet_block3d import hold_block

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("conv", ["spatial", "factorized", "full"])
@pytest.mark.parametrize("norm", ["default", "scale_shift"])
def test_output_and_every_gradient(conv: str, norm: str) -> None:
    if not native.runs_on(torch.cuda.get_device_capability()):
        pytest.skip("this build has no CUDA kernels for this device")
    hold_block(conv, norm, "cuda")
