"""Compiles the Triton kernels for a GPU that is not there: the real launch code runs, up to the launch itself.

`python -m tests.kernels.offline sm_90 all` (or `ordinary`, or part of a name) runs cases of compiled_cases.py on meta
tensors under a driver that takes each compiled binary, checks it against the device's shared memory as Triton does, and
starts nothing; it prints one JSON object per compiled kernel. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Most shared memory of one block, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}


class Compiled(NamedTuple):
    """A kernel as Triton was about to load it; has what `report` reads of Triton's own CompiledKernel."""

    metadata: Any
    asm: dict[str, bytes]


class OfflineDriver(DriverBase):
    """A driver for `architecture` whose launches end before the GPU; `compiled` collects the kernels, each once."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.compiled: list[Compiled] = []
        self.utils = self
        self._metadata: Any = None

    @classmethod
    def is_active(cls) -> bool:
        """Never chosen by itself."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """No launcher is built."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """The target to compile for."""
        return GPUTarget("cuda", int(self.architecture.removeprefix("sm_")), 32)

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        """Nothing is timed."""
        raise NotImplementedError

    def get_current_device(self) -> int:
        """The only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only stream."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What Triton holds a kernel's shared memory against."""
        return {"max_shared_mem": SHARED_MEMORY[self.architecture]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        """Stands for loading: module, function, registers, spills, most threads."""
        self.compiled.append(Compiled(self._metadata, {"cubin": binary}))
        return None, None, 0, 0, 1024

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """Stands for the launcher, made just before the binary is loaded: checks the grid and does nothing."""
        self._metadata = metadata

        def launch(x: int, y: int, z: int, *arguments: Any) -> None:
            assert 0 < x < 2**31, f"{metadata.name}: grid {(x, y, z)}"
            assert 0 < y < 2**16, f"{metadata.name}: grid {(x, y, z)}"
            assert 0 < z < 2**16, f"{metadata.name}: grid {(x, y, z)}"

        return launch


def report(kernel: Any) -> dict[str, Any]:
    """Name, registers, bytes of stack and local memory, shared memory, and counts of the instructions that matter."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", sass, re.MULTILINE)
    count = {
        name: sum(o.startswith(prefix) for o in opcodes)
        for name, prefix in (
            ("hmma", "HMMA"),
            ("hgmma", "HGMMA"),
            ("tcgen", "UTC"),
            ("ldg", "LDG"),
            ("stg", "STG"),
            ("stl", "STL"),
        )
    }
    count["ldg128"] = sum(o.startswith("LDG") and ".128" in o for o in opcodes)
    count["stg128"] = sum(o.startswith("STG") and ".128" in o for o in opcodes)
    return {
        "kernel": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "shared": kernel.metadata.shared,
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "local": int(found["LOCAL"]),
        **count,
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_NVIDIA_TOOLS / name), *arguments], check=True, capture_output=True, text=True).stdout


def main(architecture: str, which: str) -> None:
    """Print one JSON object per kernel that the chosen cases compile for `architecture`."""
    from fastvdiff.kernels import launch

    from .compiled_cases import cases

    driver = OfflineDriver(architecture)
    triton.runtime.driver.set_active(driver)
    launch.multiprocessors = lambda x: MULTIPROCESSORS[architecture]
    for name, run in cases(long=which != "ordinary"):
        if which in ("ordinary", "all") or which in name:
            driver.compiled.clear()
            run()
            for kernel in driver.compiled:
                print(json.dumps({"case": name, "architecture": architecture, **report(kernel)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
