"""The compiled CUDA kernels as GPUs would run them: registers, spills, shared memory, 128-bit accesses."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from fastvdiff import native

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


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fastvdiff-objects-")


@cache
def cubins(architecture: str) -> tuple[Path, ...]:
    """The machine code for one architecture in the compiled module."""
    if not native.cuda_architectures():
        pytest.skip("built without CUDA: nvcc was not found")
    if not any(name.partition("-")[0] == architecture[3:] for name in native.cuda_architectures()):
        pytest.skip(f"built for {', '.join(native.cuda_architectures())}, not for {architecture}")
    folder = Path(_folder().name) / architecture
    folder.mkdir()
    _tool("cuobjdump", "-arch", architecture, "-xelf", "all", str(native.library().__file__), folder=folder)
    return tuple(sorted(folder.glob("*.cubin")))


@cache
def usage(architecture: str) -> dict[str, dict[str, int]]:
    """Mangled kernel name -> registers, stack, local and shared memory."""
    text = "".join(_tool("cuobjdump", "-res-usage", str(path)) for path in cubins(architecture))
    found = re.findall(r"Function (\S+):\s+(REG:.*)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)} for name, line in found}


@cache
def opcodes(architecture: str) -> dict[str, list[str]]:
    """Mangled kernel name -> its instructions."""
    found: dict[str, list[str]] = {}
    for path in cubins(architecture):
        for part in re.split(r"^\s*\.section\s+\.text\.", _tool("nvdisasm", "-c", str(path)), flags=re.MULTILINE)[1:]:
            name = part.partition(",")[0]
            found[name] = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", part, re.MULTILINE)
    return found


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_no_spills(architecture: str) -> None:
    for name, used in usage(architecture).items():
        assert used["STACK"] == used["LOCAL"] == 0, name
        assert used["SHARED"] <= 48 * 1024, name


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("kernel", PASSES)
def test_passes(kernel: str, architecture: str) -> None:
    """As many blocks as the work is cut for are resident, and whole rows move in 128-bit accesses."""
    blocks, writes = PASSES[kernel]
    instances = {name: used for name, used in usage(architecture).items() if re.search(rf"\d{kernel}I", name)}
    assert len(instances) == 12  # three dtypes, 16 bytes or one element, two formats
    for name, used in instances.items():
        assert used["REG"] * blocks <= RESIDENT, name
        wide = "Li1EL" not in name
        ops = opcodes(architecture)[name]
        assert any(o.startswith("LDG") and ".128" in o for o in ops) == wide, name
        assert any(o.startswith("STG") and ".128" in o for o in ops) == (wide and writes), name


def test_clusters() -> None:
    """One block of 512 threads at least, asynchronous copies, and other blocks' moments read through the cluster."""
    found = {name: used for name, used in usage("sm_90a").items() if "group_norm_silu_residentI" in name}
    assert len(found) == 3  # dtypes
    for name, used in found.items():
        assert used["REG"] <= 65536 // 512, name
        ops = opcodes("sm_90a")[name]
        assert any(o.startswith("LDGSTS") and ".128" in o for o in ops), name
        assert any(o.startswith("STG") and ".128" in o for o in ops), name
        assert any(o.startswith("UCGABAR") for o in ops), name


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_convolutions(architecture: str) -> None:
    """Tensor cores on every path; asynchronous 16-byte copies and two resident blocks on those for large shapes."""
    pattern = r"conv3d_(?:product_kernelI.*Li(?:64|128)ELNS0_4LoadE(\d)E|weight_gradient_kernelI.*Lb(\d)E)"
    found = {name: m for name in usage(architecture) if (m := re.search(pattern, name))}
    assert len(found) == 3 * (2 * 4 + 2)  # dtypes; widths of a tile and ways to load, and the weight gradient's two
    for name, match in found.items():
        used, ops = usage(architecture)[name], opcodes(architecture)[name]
        load, by_element = match.groups()
        fast = load in ("0", "1") or by_element == "0"
        assert any(o.startswith("HMMA") for o in ops), name
        # One block of the weight gradient in tf32: two would have 128 registers a thread, and spill on sm_90.
        resident = 2 if fast and not ("weight" in name and "kernelIf" in name) else 1
        assert used["REG"] * resident <= RESIDENT, name
        copies = any(o.startswith("LDGSTS") and ".128" in o for o in ops)
        assert copies == (fast or load == "2"), name
        assert load is None or any(o.startswith("STG") and ".128" in o for o in ops), name
        # With three stages of 32 KiB. sm_80's code must fit a block of sm_86 and sm_89 too, the smallest of all; on
        # sm_90 the usage counts the 1 KiB that the system reserves.
        assert used["SHARED"] + 3 * 32 * 1024 <= (99 if architecture == "sm_80" else 227) * 1024, name


def test_warpgroup_convolutions() -> None:
    """Tensor copies of both kinds, warpgroup products alone, whole stores, and one block's registers and memory."""
    found = {name: used for name, used in usage("sm_90a").items() if "conv3d_sm90_kernelI" in name}
    assert len(found) == 2 * 4  # dtypes, widths of a tile
    for name, used in found.items():
        ops = opcodes("sm_90a")[name]
        assert used["REG"] <= 65536 // 384, name
        assert any(o.startswith("UTMALDG.5D.IM2COL") for o in ops), name
        assert any(o.startswith("UTMALDG.3D") for o in ops), name
        assert any(o.startswith("HGMMA.64") for o in ops), name
        assert not any(o.startswith(("HMMA", "LDSM", "STL", "LDL")) for o in ops), name
        assert any(o.startswith("STG") and ".128" in o for o in ops), name
