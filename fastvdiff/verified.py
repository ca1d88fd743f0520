"""Where kernels are known to be right: what `fastvdiff verify` found on this machine, remembered between processes.

The record holds only for the same version, the same compiled kernels and the same torch, with which its races were run;
anything else counts as nothing found.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ._version import __version__

_PACKAGE = Path(__file__).resolve().parent


def architecture(device: str) -> str:
    """The architecture of a device type: "x86_64" for a CPU, "sm_90" for a CUDA device."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    return platform.machine()


def device_name(device: str) -> str:
    """The device as its maker calls it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return _cpu_name() or platform.processor() or platform.machine()


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def path() -> Path:
    """The file of outcomes, in the user's cache folder."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "fastvdiff" / "verified.json"


@cache
def kernel_hash() -> str:
    """A hash of the compiled module and of the Triton kernels' sources."""
    kernels = next((d for d in (_PACKAGE / "kernels", _PACKAGE.parent / "kernels") if d.is_dir()), None)
    files = [*sorted(_PACKAGE.glob("_C*.so")), *(sorted(kernels.glob("*.py")) if kernels else [])]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def won(name: str, which: str) -> str:
    """What the record calls a race that the implementation `name`, an "op.impl", has won in the class `which`."""
    return f"{name} won {which}"


def load() -> dict[str, frozenset[str]]:
    """Device type -> each "op.impl" that passed there and the races that it `won`.

    Empty when the record is missing, unreadable or stale.
    """
    try:
        record = json.loads(path().read_text())
        devices = record["devices"].items()
        if not _holds(record):
            return {}
        return {
            device: frozenset((*entry["passed"], *entry["won"]))
            for device, entry in devices
            if (device != "cuda" or torch.cuda.is_available()) and entry["name"] == device_name(device)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def save(device: str, passed: Iterable[str], races: Iterable[str]) -> Path:
    """Record what passed on `device`, by "op.impl", and the `races` that were `won` there; returns the file.

    Other devices' outcomes stay.
    """
    file = path()
    entry = {"name": device_name(device), "passed": sorted(passed), "won": sorted(races)}
    try:
        record = json.loads(file.read_text())
        devices = record["devices"] if _holds(record) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        devices = {}
    replace(file, {**_holding(), "devices": {**devices, device: entry}})
    return file


def _holding() -> dict[str, str]:
    """What a record that holds now says of itself."""
    return {"version": __version__, "kernels": kernel_hash(), "torch": torch.__version__}


def _holds(record: dict[str, Any]) -> bool:
    return all(record.get(name) == value for name, value in _holding().items())


def replace(file: Path, record: dict[str, Any]) -> None:
    """Write a record of the user's cache folder at once: a reader sees the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(aside, file)
