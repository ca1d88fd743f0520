"""The compiled CUDA kernels as GPUs would run them: registers, spills, shared memory, 128-bit accesses.

Of the compiled module, and in a long run of a library for every architecture that CMakeLists.txt names.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from fastvdiff import native

ROOT = Path(__file__).resolve().parents[2]
# As CMakeLists.txt tells a user to name them all.
ARCHITECTURES = re.findall(r"DCMAKE_CUDA_ARCHITECTURES=([\w;-]+)", (ROOT / "CMakeLists.txt").read_text())[0].split(";")
# KiB of shared memory that a block may have. sm_80's code also runs on 8.6 and 8.9; from sm_90 on the usage counts the
# 1 KiB that the system keeps of each block.
SHARED = {"sm_80": 99, "sm_86": 99, "sm_89": 99, "sm_90a": 228, "sm_100a": 228, "sm_120": 100}
RESIDENT = 65536 // 256  # registers a thread may have for one block of 256 threads on a multiprocessor
PASSES = {  # kernel: (blocks that are meant to be resident, whether it writes a tensor of x's size)
    "group_norm_silu_stats": (3, False),
    "group_norm_silu_apply": (3, True),
    "group_norm_silu_backward_sums": (2, False),
    "group_norm_silu_backward_dx": (2, True),
}


def _tool(name: str, *arguments: str, folder: Path | None = None) -> str:
    """What a disassembler of Triton's wheel says."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("needs triton, which brings the disassembler")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


class Built(NamedTuple):
    """The code for one architecture in a module or a library."""

    file: Path
    architecture: str

    @property
    def usage(self) -> dict[str, dict[str, int]]:
        """Mangled kernel name -> registers, stack, local and shared memory."""
        return _usage(self)

    @property
    def opcodes(self) -> dict[str, list[str]]:
        """Mangled kernel name -> its instructions."""
        return _opcodes(self)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fastvdiff-objects-")


@cache
def _library() -> Path:
    """The CUDA kernels for every architecture, as a user's CMAKE_ARGS would build them."""
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("nvcc") is None:
        pytest.skip("needs cmake and nvcc")
    build = Path(_folder().name) / "build"
    configure = [cmake, "-S", str(ROOT), "-B", str(build), "-DFASTVDIFF_PYTHON=OFF", "-DFASTVDIFF_CUDA=ON",
                 f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(ARCHITECTURES)}"]  # fmt: skip
    for command in (configure, [cmake, "--build", str(build), "--target", "fastvdiff_cuda", f"-j{os.cpu_count()}"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return build / "libfastvdiff_cuda.a"


@pytest.fixture(params=[
    "sm_80", "sm_90a",
    *(pytest.param(f"sm_{name.partition('-')[0]} of the library", marks=pytest.mark.long) for name in ARCHITECTURES),
])  # fmt: skip
def built(request: pytest.FixtureRequest) -> Built:
    """Each architecture of the module, then of the library."""
    architecture, _, rest = request.param.partition(" ")
    if rest:
        return Built(_library(), architecture)
    if not native.cuda_architectures():
        pytest.skip("built without CUDA: nvcc was not found")
    if not any(name.partition("-")[0] == architecture[3:] for name in native.cuda_architectures()):
        pytest.skip(f"built for {', '.join(native.cuda_architectures())}, not for {architecture}")
    return Built(Path(str(native.library().__file__)), architecture)


@cache
def _cubins(built: Built) -> tuple[Path, ...]:
    folder = Path(_folder().name) / built.file.stem / built.architecture
    folder.mkdir(parents=True)
    _tool("cuobjdump", "-arch", built.architecture, "-xelf", "all", str(built.file), folder=folder)
    found = tuple(sorted(folder.glob("*.cubin")))
    assert found
    return found


@cache
def _usage(built: Built) -> dict[str, dict[str, int]]:
    text = "".join(_tool("cuobjdump", "-res-usage", str(path)) for path in _cubins(built))
    found = re.findall(r"Function (\S+):\s+(REG:.*)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)} for name, line in found}


@cache
def _opcodes(built: Built) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in _cubins(built):
        for part in re.split(r"^\s*\.section\s+\.text\.", _tool("nvdisasm", "-c", str(path)), flags=re.MULTILINE)[1:]:
            name = part.partition(",")[0]
            found[name] = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", part, re.MULTILINE)
    return found


def test_no_spills(built: Built) -> None:
    for name, used in built.usage.items():
        assert used["STACK"] == used["LOCAL"] == 0, name
        assert used["SHARED"] <= 48 * 1024, name


@pytest.mark.parametrize("kernel", PASSES)
def test_passes(kernel: str, built: Built) -> None:
    """As many blocks as the work is cut for are resident, and whole rows move in 128-bit accesses."""
    blocks, writes = PASSES[kernel]
    instances = {name: used for name, used in built.usage.items() if re.search(rf"\d{kernel}I", name)}
    assert len(instances) == 12  # three dtypes, 16 bytes or one element, two formats
    for name, used in instances.items():
        assert used["REG"] * blocks <= RESIDENT, name
        wide = "Li1EL" not in name
        ops = built.opcodes[name]
        assert any(o.startswith("LDG") and ".128" in o for o in ops) == wide, name
        assert any(o.startswith("STG") and ".128" in o for o in ops) == (wide and writes), name


def test_clusters(built: Built) -> None:
    """One block of 512 threads at least, asynchronous copies, and other blocks' moments read through the cluster.

    Code for an architecture without clusters stops the program: what is offered never gets there.
    """
    found = {name: used for name, used in built.usage.items() if "group_norm_silu_residentI" in name}
    assert len(found) == 3  # dtypes
    for name, used in found.items():
        assert used["REG"] <= 65536 // 512, name
        ops = built.opcodes[name]
        assert any(o.startswith("UCGABAR") for o in ops) == (built.architecture not in ("sm_80", "sm_86", "sm_89")), (
            name
        )
        if built.architecture in ("sm_90a", "sm_100a"):
            assert any(o.startswith("LDGSTS") and ".128" in o for o in ops), name
            assert any(o.startswith("STG") and ".128" in o for o in ops), name


def test_convolutions(built: Built) -> None:
    """Tensor cores on every path; asynchronous 16-byte copies and two resident blocks on those for large shapes."""
    pattern = r"conv3d_(?:product_kernelI.*Li(?:64|128)ELNS0_4LoadE(\d)E|weight_gradient_kernelI.*Lb(\d)E)"
    found = {name: m for name in built.usage if (m := re.search(pattern, name))}
    assert len(found) == 3 * (2 * 4 + 2)  # dtypes; widths of a tile and ways to load, and the weight gradient's two
    for name, match in found.items():
        used, ops = built.usage[name], built.opcodes[name]
        load, by_element = match.groups()
        fast = load in ("0", "1") or by_element == "0"
        assert any(o.startswith("HMMA") for o in ops), name
        # One block of the weight gradient in tf32: two would have 128 registers a thread, and spill on sm_90.
        resident = 2 if fast and not ("weight" in name and "kernelIf" in name) else 1
        assert used["REG"] * resident <= RESIDENT, name
        copies = any(o.startswith("LDGSTS") and ".128" in o for o in ops)
        assert copies == (fast or load == "2"), name
        assert load is None or any(o.startswith("STG") and ".128" in o for o in ops), name
        assert used["SHARED"] + 3 * 32 * 1024 <= SHARED[built.architecture] * 1024, name  # three stages of 32 KiB


@pytest.mark.parametrize(("kernel", "shapes"), [("conv3d_sm90_kernel", 4), ("conv3d_sm90_cluster_kernel", 7)])
def test_warpgroup_convolutions(built: Built, kernel: str, shapes: int) -> None:
    """Tensor copies of both kinds, warpgroup products alone, whole stores, and one block's registers and memory.

    Code for any other architecture stops the program.
    """
    found = {name: used for name, used in built.usage.items() if f"{kernel}I" in name}
    assert len(found) == 2 * shapes  # dtypes, shapes of a tile
    for name, used in found.items():
        ops = built.opcodes[name]
        if built.architecture != "sm_90a":
            assert any(o.startswith("BPT.TRAP") for o in ops), name
            assert not any(o.startswith(("STG", "HGMMA", "HMMA")) for o in ops), name
            continue
        assert used["REG"] <= 65536 // 384, name
        assert any(o.startswith("UTMALDG.5D.IM2COL") for o in ops), name
        assert any(o.startswith("UTMALDG.3D") for o in ops), name
        assert any(o.startswith("HGMMA.64") for o in ops), name
        assert not any(o.startswith(("HMMA", "LDSM", "STL", "LDL")) for o in ops), name
        assert any(o.startswith("STG") and ".128" in o for o in ops), name
