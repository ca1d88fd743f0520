"""`fastvdiff doctor`: versions, devices, and which implementation each op would use here."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.table import Table

from fastvdiff import __version__, dispatch, native, ops, verified

from .examples import EXAMPLES, Draw
from .tables import table_console


def doctor() -> None:
    """Print versions, devices, the state of the compiled kernels, and what each op runs on each device and dtype."""
    console = table_console()
    about = Table("what", "found", title=f"fastvdiff {__version__}")
    about.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    about.add_row("torch", f"{torch.__version__} ({torch.get_num_threads()} threads)")
    for package in ("triton", "numpy", "safetensors", "huggingface_hub", "diffusers"):
        about.add_row(package, _version(package))
    about.add_row("CPU", verified.device_name("cpu"))
    about.add_row("GPU", _gpu())
    about.add_row("CPU kernels", _native())
    about.add_row("CUDA kernels", _cuda_kernels())
    console.print(about)

    table = Table("op", "device", "dtype", "runs", "why no other kernel", title="what each op runs here")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for op in dispatch.ops():
            for dtype in (torch.float32, torch.bfloat16):
                table.add_row(op, device, str(dtype)[6:], *_row(op, device, dtype))
    console.print(table)


def _row(op: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """What one op runs on one device, and the other implementations' reasons."""
    example = next(e for e in EXAMPLES if e.op == op)
    args, kwargs = example.make(Draw(dtype, device), True)
    try:
        walk = dispatch.trace(getattr(ops, op), *args, **kwargs)[0]
    except (ImportError, RuntimeError) as error:
        return "fails", str(error)
    better = {name: reason for name, reason in walk.reasons.items() if name != "reference"}
    return walk.chosen, "\n".join(f"{name}: {reason}" for name, reason in better.items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return f"{verified.device_name('cuda')} ({verified.architecture('cuda')}, CUDA {torch.version.cuda})"


def _native() -> str:
    try:
        return f"built; this CPU runs {', '.join(native.available_isas())}; in use: {native.isa()}"
    except ImportError as error:
        return str(error)


def _cuda_kernels() -> str:
    try:
        built = native.cuda_architectures()
    except ImportError:
        return "none: the compiled module does not load"
    return f"built for {', '.join(built)}" if built else "not built: nvcc was not found, or FASTVDIFF_CUDA=OFF"
