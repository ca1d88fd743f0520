"""geglu's Triton kernels, under the interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from fastvdiff.kernels import launch
from fastvdiff.ops import geglu
from tests.closeness import hold
from tests.ops.test_geglu import DTYPES, eager, tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=60)
@given(tensors(DEVICE))
def test_holds_to_float64(x: torch.Tensor) -> None:
    y = hold(geglu, x, impl="triton", dtype=x.dtype, baseline=lambda x: eager(x))
    assert y.dtype == x.dtype
    assert y.is_contiguous()


@pytest.mark.parametrize("width", [40, 128, 200])
def test_every_candidate_configuration(device: str, width: int) -> None:
    x = torch.randn(5, 7, 2 * width, device=device, requires_grad=True)
    with launch.recorded() as launches:
        geglu(x, impl="triton").sum().backward()
    assert {used.kernel for used in launches} == {"geglu_fwd", "geglu_bwd"}
    for used in launches:
        assert used.used in used.candidates
        for candidate in used.candidates if device == "cuda" else used.candidates[:1]:
            with launch.trying(used.kernel, used.shape_class, candidate):
                hold(geglu, x, impl="triton", dtype=torch.float32, baseline=lambda x: eager(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(50, 9216, 2560), (2048, 16, 2560), (50, 144, 10240), (7, 1001, 2 * 999)], ids=str)
def test_full_size(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    hold(geglu, x, impl="triton", dtype=dtype, baseline=lambda x: eager(x))


@pytest.mark.gpu
def test_large_past_2_to_the_31_elements() -> None:
    rows, width = 2**21 + 3, 1280
    x = torch.zeros(rows, 2 * width, device="cuda", dtype=torch.bfloat16)
    x[-5:].normal_()
    y = geglu(x, impl="triton")
    torch.testing.assert_close(y[-5:], eager(x[-5:].float()).bfloat16())
    assert not y[:-5].any()
