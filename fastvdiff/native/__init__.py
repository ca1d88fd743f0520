"""The native boundary: tensors in, addresses + strides + thread count out. The only importer of `fastvdiff._C`.

A module per op beside this one turns checked tensors into a call. Python allocates every output and workspace.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ISAS = ("generic", "avx2", "avx512")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@cache
def library() -> ModuleType:
    """The compiled module, checked once against the sources of an editable install."""
    try:
        from fastvdiff import _C
    except ImportError as error:
        raise ImportError(
            "fastvdiff's compiled kernels are missing or do not load; build them with: pip install -e ."
            ' (or run everything on plain torch with FASTVDIFF_IMPL="reference")'
        ) from error
    sources = Path(__file__).resolve().parents[2] / "csrc"
    if (sources / "bindings.cpp").is_file() and _boundary_hash(sources) != _C.boundary_hash:
        raise ImportError(
            "fastvdiff's compiled kernels are older than csrc/include or csrc/bindings*; rebuild: pip install -e ."
        )
    return _C


def _boundary_hash(sources: Path) -> str:
    """The hash that CMakeLists.txt compiles into the module, over the boundary's files in path order."""
    paths = sorted([*(sources / "include" / "fastvdiff").glob("*.h"), *sources.glob("bindings*")])
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    return hashlib.sha256(digests.encode()).hexdigest()


def isa() -> str:
    """The instruction set that the CPU kernels use: "generic", "avx2" or "avx512"."""
    return ISAS[library().current_isa()]


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this build has and this CPU runs."""
    return ISAS[: library().best_isa() + 1]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels on another instruction set of `available_isas()`; the process's, not the thread's."""
    before = library().current_isa()
    library().set_current_isa(ISAS.index(name))
    try:
        yield
    finally:
        library().set_current_isa(before)


def cuda_architectures() -> tuple[str, ...]:
    """What this build's CUDA kernels were compiled for, as CMake names them ("90a-real"); empty without CUDA."""
    return tuple(library().cuda_architectures)


def runs_on(capability: tuple[int, int], least: int = 0) -> bool:
    """Whether this build has CUDA kernels for a device of this compute capability.

    least: 90 leaves out code for older architectures than 9.0, which a newer device may run as well.
    """
    return any(_covers(built, capability, least) for built in cuda_architectures())


def _covers(built: str, capability: tuple[int, int], least: int) -> bool:
    """Machine code runs within its major version (that of 90a on 9.0 alone), PTX on anything newer."""
    name, _, kind = built.partition("-")
    if not name[:1].isdigit():  # native, all, all-major: whoever built it meant this device
        return True
    number, own = name.rstrip("af"), capability[0] * 10 + capability[1]
    if int(number) < least:
        return False
    if name != number:
        return own == int(number)
    same = own // 10 == int(number) // 10 and own >= int(number)
    return same or (kind != "real" and own >= int(number))


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A block whose launches go to x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def stream(x: torch.Tensor) -> int:
    """The current stream of x's device, as the launchers take it."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def multiprocessors(x: torch.Tensor) -> int:
    """Multiprocessors of x's device; few where a test runs a CUDA kernel on a CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def address(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A small parameter as the kernels read it: contiguous float32."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.detach().to(torch.float32).contiguous()


def threads() -> int:
    """Threads for a kernel: torch's own setting."""
    return torch.get_num_threads()
