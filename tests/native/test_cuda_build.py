"""The CUDA part of the build and of the boundary, without a GPU: what it covers, and how it fails."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastvdiff import native
from fastvdiff.ops import group_norm_silu, registration

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("80", (12, 0), True),  # by its PTX
        ("80-real", (9, 0), False),
        ("86-real", (8, 0), False),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f-real", (10, 3), False),
        ("120-real", (12, 1), True),
        ("80-virtual", (9, 0), True),
        ("all-major", (9, 0), True),
    ],
)
def test_what_a_build_covers(built: str, capability: tuple[int, int], runs: bool) -> None:
    with mock.patch.object(native, "cuda_architectures", return_value=(built,)):
        assert native.runs_on(capability) == runs


@pytest.mark.parametrize(("built", "runs"), [("80", False), ("90a-real", True), ("90", True), ("80-virtual", False)])
def test_code_for_older_devices_has_no_clusters(built: str, runs: bool) -> None:
    with mock.patch.object(native, "cuda_architectures", return_value=(built,)):
        assert native.runs_on((9, 0), least=90) == runs


@pytest.mark.parametrize(
    ("built", "sentence"),
    [((), "built without CUDA"), (("90a-real",), "built for 90a-real, not for compute capability 8.0")],
)
def test_why_not(built: tuple[str, ...], sentence: str) -> None:
    registration._not_built_for.cache_clear()
    with mock.patch.object(native, "cuda_architectures", return_value=built):
        assert sentence in str(registration._not_built_for(8, 0))
    registration._not_built_for.cache_clear()


@pytest.mark.parametrize(
    ("built", "capability", "sentence"),
    [
        (("80", "90a-real"), (9, 0), None),
        # The driver compiles sm_80's PTX for 10.0: enough for every kernel but this one.
        (("80", "90a-real"), (10, 0), 'no code with clusters .* 10.0; rebuild: .*ARCHITECTURES=80;100a-real"'),
        (("80",), (9, 0), "built for 80: no code with clusters for compute capability 9.0"),
        (("80", "100a-real"), (10, 0), None),
        (("80", "90"), (10, 0), None),  # by its PTX
        (("90a-real",), (10, 0), "built for 90a-real, not for compute capability 10.0"),
        (("80", "120-real"), (12, 0), "runs on compute capability 9.0 and 10.0, not 12.0"),
    ],
)
def test_which_builds_have_clusters(built: tuple[str, ...], capability: tuple[int, int], sentence: str | None) -> None:
    registration._not_built_for.cache_clear()
    with (
        mock.patch.object(native, "cuda_architectures", return_value=built),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
    ):
        reason = registration._no_clusters_on_this()
        assert reason is None if sentence is None else re.search(sentence, str(reason))
        if capability == (10, 0) and "80" in built:
            assert registration._not_built_for_this() is None
    registration._not_built_for.cache_clear()


def test_no_module_is_a_reason_not_an_error() -> None:
    registration._not_built_for.cache_clear()
    with mock.patch.object(native, "cuda_architectures", side_effect=ImportError("do not load")):
        assert registration._not_built_for(8, 0) == "do not load"
    registration._not_built_for.cache_clear()


def test_cpu_tensors_are_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="cuda: runs on NVIDIA GPUs, not cpu"):
        group_norm_silu(torch.randn(1, 4, 2, 3, 3), 2, impl="cuda")


def test_launch_errors_name_the_kernel() -> None:
    """Where no GPU can be used a launch fails at once, through the whole binding, before anything is read."""
    if not native.cuda_architectures():
        pytest.skip("built without CUDA: nvcc was not found")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the launch would run")
    call = ((1, 8, 4, 2, 1), (True, False), 0, 2)
    none, parameter, gradient = (0, 0, 0), (0, 0, 0, 0, 0), (0, False, 0)
    lib = native.library()
    assert lib.cuda_group_norm_silu_workspace(*call, False) > 0
    with pytest.raises(RuntimeError, match="group_norm_silu_stats"):
        lib.cuda_group_norm_silu_forward(*call, 0, none, [parameter] * 4, 0, 0, none, 0, 1e-5)
    with pytest.raises(RuntimeError, match="group_norm_silu_backward_sums"):
        lib.cuda_group_norm_silu_backward(*call, 0, none, [parameter] * 4, 0, 0, none, none, [gradient] * 4)


def test_on_without_nvcc_is_an_error(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    compiler = shutil.which("c++")
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-DFASTVDIFF_CUDA=ON", "-DFASTVDIFF_PYTHON=OFF",
               f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_CUDA_COMPILER=NOTFOUND"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no CUDA compiler was found" in done.stderr.replace("\n", " ")
