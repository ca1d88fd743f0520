"""csrc/cpu/simd.h, each instruction set by itself: conversions bit by bit, exp and silu over every exponent."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastvdiff import native

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
# As in CMakeLists.txt.
FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


@pytest.fixture(scope="module", params=native.ISAS)
def simd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """simd_check.cpp compiled for one instruction set."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    if request.param not in native.available_isas():
        pytest.skip(f"this CPU or build has no {request.param}")
    library = tmp_path_factory.mktemp("simd") / f"{request.param}.so"
    command = [
        COMPILER, "-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
        *FLAGS[request.param], f"-DFASTVDIFF_ISA={request.param}", "-shared", "-fPIC",
        "-I", str(ROOT / "csrc" / "cpu"), "-I", str(ROOT / "csrc" / "include"),
        str(Path(__file__).with_name("simd_check.cpp")), "-o", str(library),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.sum_first.restype = ctypes.c_float
    return loaded


def apply(function: ctypes._CFuncPtr, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """function(x) elementwise into a tensor of `dtype`; the element past the end must stay as it is."""
    out = torch.full((x.numel() + 1,), -7.0, dtype=dtype)
    function(*(ctypes.c_void_p(t.data_ptr()) for t in (x, out)), ctypes.c_int64(x.numel()))
    assert out[-1] == -7.0
    return out[:-1]


def bits(t: torch.Tensor) -> torch.Tensor:
    """t's bits, with every NaN made the same."""
    whole = torch.where(torch.isnan(t), torch.full_like(t, float("nan")), t)
    return whole.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def dense_floats() -> torch.Tensor:
    """Every 1021st float32 pattern, and all those whose low half makes a tie, or nearly, in 16 bits."""
    spread = torch.arange(-(2**31), 2**31, 1021, dtype=torch.int64)
    high = torch.arange(-(2**15), 2**15, dtype=torch.int64)[:, None] * 2**16
    bf16_ties = high + torch.tensor([0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    f16_ties = high + torch.tensor([0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0xF000])
    return torch.cat([spread, bf16_ties.flatten(), f16_ties.flatten()]).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_narrow_to_float_exactly(simd: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    assert torch.equal(bits(apply(simd[f"from_{name}"], every, torch.float32)), bits(every.float()))
    if name == "f16":
        assert torch.equal(bits(apply(simd.scalar_from_f16, every, torch.float32)), bits(every.float()))


@pytest.mark.parametrize("form", ["", "scalar_"], ids=("vector", "scalar"))
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_float_to_narrow_exactly(simd: ctypes.CDLL, name: str, dtype: torch.dtype, form: str) -> None:
    x = dense_floats()
    assert torch.equal(bits(apply(simd[f"{form}to_{name}"], x, dtype)), bits(x.to(dtype)))


def test_exp_within_one_ulp(simd: ctypes.CDLL) -> None:
    x = torch.cat([dense_floats(), torch.linspace(-104, 89, 2_000_003)])
    y, exact = apply(simd.exp_all, x, torch.float32), x.double().exp()
    rounded = exact.float()
    assert torch.equal(torch.isnan(y), torch.isnan(x))
    normal = torch.isfinite(rounded) & (rounded > 0)
    ulp = torch.frexp(rounded[normal].double()).exponent.sub(24).clamp(min=-149).double().exp2()
    assert ((y.double() - exact)[normal].abs() / ulp).max() <= 1.0
    assert torch.equal(torch.isinf(y), torch.isinf(rounded))
    assert (y[rounded == 0] <= 1.5e-45).all()


def test_sigmoid_and_silu(simd: ctypes.CDLL) -> None:
    x = torch.cat([dense_floats(), torch.linspace(-30, 30, 2_000_003)])
    sigmoid = x.double().sigmoid()
    for function, exact in ((simd.sigmoid_all, sigmoid), (simd.silu_all, x.double() * sigmoid)):
        y, ordinary = apply(function, x, torch.float32), torch.isfinite(x)
        error = (y.double() - exact)[ordinary].abs() / exact[ordinary].abs().clamp(min=1e-4)
        assert error.max() < 1e-6
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0])
    expected = torch.nn.functional.silu(ends)
    torch.testing.assert_close(apply(simd.silu_all, ends, torch.float32), expected, equal_nan=True, rtol=0, atol=0)


def test_partial_vectors(simd: ctypes.CDLL) -> None:
    width = simd.width()
    x = torch.arange(1, width + 1, dtype=torch.float32)
    for n in range(width + 1):
        total = simd.sum_first(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(n))
        assert total == n * (n + 1) / 2
    for n in range(1, 2 * width + 1):
        long = torch.arange(2 * width, dtype=torch.float32)[:n].contiguous()
        for dtype, name in ((torch.bfloat16, "to_bf16"), (torch.float16, "to_f16")):
            assert torch.equal(apply(simd[name], long, dtype).float(), long)
