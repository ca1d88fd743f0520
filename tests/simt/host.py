"""Builds .cu sources for the CPU under the SIMT shim (simt.h, simt.cpp) and calls their launchers.

A test names its sources, relative to the project (kernels under csrc/cuda and a file of SIMT_ENTRY lines), fills a
ctypes.Structure that mirrors the launcher's parameters, and calls:

    call(SOURCES, "entry", Params(batch=2, ...), {"x": x, "y": y})                      # the ordinary build
    call(SOURCES, "entry", Params(...), tensors, descending=True)                       # the other thread order
    call(SOURCES, "entry", Params(...), tensors, build="races")                         # races in shared memory
    call(SOURCES, "entry", Params(...), tensors, build="sanitized")                     # ASan and UBSan, own process

`tensors` are CPU tensors whose addresses go into the pointer fields of those names ("bias.data": a field of a field).
What a kernel does wrong raises `KernelError` with the file and line.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILER = shutil.which("g++")
BUILDS = ("ordinary", "races", "sanitized")
_FLAGS = [
    "-std=c++17", "-O2", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
    "-DFASTVDIFF_SIMT", "-I", str(HERE), "-I", str(ROOT / "csrc" / "include"), "-I", str(ROOT / "csrc" / "cuda"),
]  # fmt: skip
_SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]


class KernelError(Exception):
    """What the shim, or a sanitizer, found wrong with a kernel."""


def require_shim() -> None:
    """Skip where the shim cannot be built."""
    if COMPILER is None:
        pytest.skip("needs g++")
    if platform.machine() != "x86_64":
        pytest.skip("the shim's context switch is written for x86-64")


@functools.cache
def _folder() -> Path:
    """Where this session's libraries go: one place for all of its processes, removed by the last to end."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(tempfile.gettempdir()) / f"fastvdiff-simt-{session}"
    folder.mkdir(exist_ok=True)
    user = folder / f"user-{os.getpid()}"
    user.touch()
    atexit.register(_leave, user)
    return folder


def _leave(user: Path) -> None:
    user.unlink(missing_ok=True)
    if not any(user.parent.glob("user-*")):
        shutil.rmtree(user.parent, ignore_errors=True)


@functools.cache
def library(sources: tuple[str, ...], build: str = "ordinary") -> Path:
    """The shared library of these sources and the shim, built once a session, by the process that needs it first."""
    require_shim()
    path = _folder() / f"{'-'.join(Path(s).stem for s in sources)}-{build}.so"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _build(sources, build, path)
    return path


def _build(sources: tuple[str, ...], build: str, path: Path) -> None:
    # Only the sources under test are instrumented for races; the runtime is what finds them.
    # -O1: the sanitizers' checks take twice as long to compile at -O2, more than the calls gain.
    of_kernels = {
        "ordinary": [], "races": ["-fsanitize=thread", "-DSIMT_RACES"], "sanitized": [*_SANITIZE, "-O1"],
    }[build]  # fmt: skip
    of_shim = ["-DSIMT_RACES"] if build == "races" else of_kernels
    parts = [(ROOT / source, of_kernels) for source in sources] + [(HERE / "simt.cpp", of_shim)]
    if build == "races":
        parts.append((HERE / "races.cpp", of_shim))
    objects = []
    for source, flags in parts:
        objects.append(path.with_suffix(f".{len(objects)}.o"))
        _run([COMPILER, *_FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(objects[-1])])
    linked = _SANITIZE if build == "sanitized" else []
    whole = path.with_suffix(".part")
    _run([COMPILER, "-shared", *linked, *map(str, objects), "-o", str(whole)])
    whole.rename(path)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or "warning:" in done.stderr:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def call(
    sources: tuple[str, ...],
    entry: str,
    params: ctypes.Structure,
    tensors: dict[str, torch.Tensor | None],
    *,
    build: str = "ordinary",
    descending: bool = False,
) -> None:
    """Run an entry with the tensors' addresses in `params`; results are written to the tensors."""
    given = {name: t for name, t in tensors.items() if t is not None}
    for name, t in given.items():
        if t.device.type != "cpu":
            raise ValueError(f"{name}: a CPU tensor, got one on {t.device}")
        *outer, last = name.split(".")
        setattr(functools.reduce(getattr, outer, params), last, t.data_ptr())
    if build == "sanitized":
        _call_sanitized(library(sources, build), entry, params, given, descending)
    else:
        run(sources, entry, params, build=build, descending=descending)


def load(sources: tuple[str, ...], build: str = "ordinary") -> ctypes.CDLL:
    """The library of these sources, in this process: not the sanitized build."""
    return _loaded(library(sources, build))


def run(
    sources: tuple[str, ...], entry: str, params: ctypes.Structure, *, build: str = "ordinary", descending: bool = False
) -> None:
    """Run an entry whose parameters hold every address already."""
    path, lib = library(sources, build), load(sources, build)
    lib.simt_set_order(ctypes.c_int(descending))
    message = ctypes.create_string_buffer(1024)
    if lib[entry](ctypes.byref(params), message, ctypes.c_size_t(1024)):
        raise KernelError(_symbolized(path, message.value.decode()))


def _symbolized(path: Path, message: str) -> str:
    """The message with its return addresses as file:line."""

    def line_of(match: re.Match[str]) -> str:
        address = int(match.group(1), 16)
        mapped = re.search(rf"^([0-9a-f]+)-.* ([0-9a-f]+) \S+ \S+ +{re.escape(str(path))}$",
                           Path("/proc/self/maps").read_text(), re.MULTILINE)  # fmt: skip
        if mapped is None or shutil.which("addr2line") is None:
            return match.group(0)
        offset = address - int(mapped.group(1), 16) + int(mapped.group(2), 16) - 1
        done = subprocess.run(["addr2line", "-e", str(path), hex(offset)], capture_output=True, text=True, check=True)
        return f"at {done.stdout.strip().split(' (')[0]}"

    return re.sub(r"\[(0x[0-9a-f]+)\]", line_of, message)


def _call_sanitized(
    path: Path, entry: str, params: ctypes.Structure, tensors: dict[str, torch.Tensor], descending: bool
) -> None:
    """The call in a process of its own, each tensor's storage in an allocation of exactly its size."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors.values()}
    order = list(storages)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, storage in enumerate(storages.values()):
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            (folder / str(i)).write_bytes(whole.numpy().tobytes())
        pointers = [
            (_offset(type(params), field), order.index(t.untyped_storage().data_ptr()),
             t.data_ptr() - t.untyped_storage().data_ptr())
            for field, t in tensors.items()
        ]  # fmt: skip
        request = {"library": str(path), "entry": entry, "params": bytes(params).hex(), "pointers": pointers,
                   "buffers": len(order), "descending": descending}  # fmt: skip
        (folder / "request.json").write_text(json.dumps(request))
        preload = [_compiler_file(lib) for lib in ("libasan.so", "libubsan.so")]
        environment = {**os.environ, "LD_PRELOAD": " ".join(preload),
                       "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}  # fmt: skip
        done = subprocess.run([sys.executable, "-S", "-E", str(HERE / "sanitized_call.py"), name],
                              capture_output=True, text=True, env=environment)  # fmt: skip
        if done.returncode:
            raise KernelError(done.stderr or f"ended with {done.returncode}")
        for i, storage in enumerate(storages.values()):
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            whole.copy_(torch.frombuffer(bytearray((folder / str(i)).read_bytes()), dtype=torch.uint8))


def _offset(fields: Any, name: str) -> int:
    """Bytes from a structure's start to the field, or field of a field, of this name."""
    first, _, rest = name.partition(".")
    return getattr(fields, first).offset + (_offset(dict(fields._fields_)[first], rest) if rest else 0)


def _compiler_file(name: str) -> str:
    return subprocess.run(
        [str(COMPILER), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
