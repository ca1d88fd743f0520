"""The SIMT shim itself: right kernels give right results, and each kind of mistake is found where it can be."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from .host import BUILDS, ROOT, KernelError, call, library

SOURCES = ("tests/simt/selftest.cu",)
NONE, NO_BARRIER, NO_WAIT, DIVERGENT, EARLY_RETURN, WRITE_AFTER_READ, OVERRUN, NO_WARP_BARRIER = range(8)


class Params(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("a", "b", "d")],
        *[(name, ctypes.c_int64) for name in ("m", "n", "k")],
        ("mistake", ctypes.c_int32),
    )


def sums(mistake: int, **options: object) -> None:
    """The block sums with a mistake; asserts the result."""
    a = torch.arange(128, dtype=torch.float32)
    d = torch.full((128,), torch.nan)
    call(SOURCES, "sums_f32", Params(m=2, mistake=mistake), {"a": a, "d": d}, **options)
    expected = a.view(2, 64).sum(1, keepdim=True).mul(3).expand(2, 64).flatten()
    torch.testing.assert_close(d, expected, rtol=0, atol=0)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("entry", "dtype", "transposed"),
    [
        ("product_bf16", torch.bfloat16, False),
        ("product_f16", torch.float16, False),
        ("product_transposed_bf16", torch.bfloat16, True),
        ("product_tf32_f32", torch.float32, False),
    ],
)
def test_products(entry: str, dtype: torch.dtype, transposed: bool, build: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 48, generator=generator).to(dtype) for rows in (16, 8))
    d = torch.full((16, 8), torch.nan)
    operand = b.T.contiguous() if transposed else b
    call(SOURCES, entry, Params(m=16, n=8, k=48), {"a": a, "b": operand, "d": d}, build=build)
    # The products of 11-bit mantissas are exact; tf32 rounds its operands to 11 bits.
    tolerance = 2e-3 if dtype == torch.float32 else 1e-5
    torch.testing.assert_close(d.double(), a.double() @ b.double().T, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("descending", [False, True], ids=("ascending", "descending"))
@pytest.mark.parametrize("build", BUILDS)
def test_right_kernels_pass(build: str, descending: bool) -> None:
    sums(NONE, build=build, descending=descending)
    a, d = torch.arange(1.0, 65.0), torch.full((64,), torch.nan)
    call(SOURCES, "neighbours_f32", Params(), {"a": a, "d": d}, build=build, descending=descending)
    assert torch.equal(d, a)


@pytest.mark.parametrize("descending", [False, True], ids=("ascending", "descending"))
@pytest.mark.parametrize("mistake", [NO_BARRIER, NO_WAIT], ids=("no barrier", "no wait"))
def test_unsynchronised_reads_give_wrong_results(mistake: int, descending: bool) -> None:
    with pytest.raises(AssertionError):
        sums(mistake, descending=descending)


@pytest.mark.parametrize(("mistake", "message"), [
    (DIVERGENT, r"sync_threads at .*selftest\.cu:\d+: divergent: others wait in sync_threads at .*selftest\.cu:\d+"),
    (EARLY_RETURN, r"waits in sync_threads at .*selftest\.cu:\d+, thread 5 has ended"),
])  # fmt: skip
def test_meetings_that_never_happen(mistake: int, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        sums(mistake)


@pytest.mark.parametrize("descending", [False, True], ids=("ascending", "descending"))
@pytest.mark.parametrize("mistake", [NO_BARRIER, NO_WAIT, WRITE_AFTER_READ], ids=("RAW", "no wait", "WAR"))
def test_races(mistake: int, descending: bool) -> None:
    with pytest.raises(KernelError, match=r"race on byte \d+ of shared memory: .*selftest\.cu:\d+"):
        sums(mistake, build="races", descending=descending)


def test_races_within_a_warp() -> None:
    a, d = torch.arange(1.0, 65.0), torch.empty(64)
    with pytest.raises(KernelError, match="race on byte"):
        call(SOURCES, "neighbours_f32", Params(mistake=NO_WARP_BARRIER), {"a": a, "d": d}, build="races")


def test_overruns() -> None:
    with pytest.raises(KernelError, match=r"AddressSanitizer[\s\S]*async_copy"):
        sums(OVERRUN, build="sanitized")
    short, d = torch.ones(127), torch.zeros(128)
    with pytest.raises(KernelError, match="heap-buffer-overflow"):
        call(SOURCES, "sums_f32", Params(m=2), {"a": short, "d": d}, build="sanitized")
    odd = torch.ones(16 * 48 + 1, dtype=torch.bfloat16)[1:]
    with pytest.raises(KernelError, match=r"cp_async at .*selftest\.cu:\d+: misaligned address"):
        call(SOURCES, "product_bf16", Params(k=48), {"a": odd, "b": odd, "d": d}, build="ordinary")


def test_selftest_is_cuda(tmp_path: Path) -> None:
    """The same source is also what nvcc takes, so the shim declares nothing that CUDA does not have."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    command = [nvcc, "-std=c++17", "-arch=sm_80", "-cubin", "-I", "csrc/cuda", "-I", "csrc/include", "-I", "tests/simt",
               "tests/simt/selftest.cu", "-o", str(tmp_path / "selftest.cubin")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_libraries_are_built_once() -> None:
    assert library(SOURCES) is library(SOURCES)
