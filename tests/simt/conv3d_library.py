"""fastvdiff/native/conv3d_cuda.py on CPU tensors: its compiled library replaced by the same sources under the shim."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import pytest
import torch

from fastvdiff.native import conv3d_cuda as native
from fastvdiff.native import conv3d_cuda_sm90, norm_silu_conv3d_cuda
from fastvdiff.ops import registration

from .host import _loaded, call, library

SOURCES = (
    "csrc/cuda/conv3d.cu", "csrc/cuda/conv3d_bf16.cu", "csrc/cuda/conv3d_f16.cu", "csrc/cuda/conv3d_f32.cu",
    "tests/simt/conv3d_entry.cpp",
)  # fmt: skip
_ENTRIES = ("forward", "data_gradient", "weight_gradient")


class _Params(ctypes.Structure):
    """Conv3dParams: pointers, strides and numbers in the order in which the native module passes them."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in native._POINTERS],
        ("strides", ctypes.c_int64 * 22),
        ("batch", ctypes.c_int64),
        ("numbers", ctypes.c_int32 * 28),
    )


class _PrologueParams(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("stats", "weight", "bias", "scale", "shift", "table")],
        *[(name, ctypes.c_int64) for name in (
            "batch", "channels", "groups", "frames", "scale_frames", "shift_frames", "values",
        )],
        ("eps", ctypes.c_double),
    )  # fmt: skip


class Library:
    """The binding's functions, run by the shim."""

    def __init__(self, build: str, descending: bool) -> None:
        self.options = {"build": build, "descending": descending}
        self.tensors: dict[int, torch.Tensor] = {}

    def address(self, tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return 0
        self.tensors[tensor.data_ptr()] = tensor
        return tensor.data_ptr()

    def cuda_conv3d_workspace(self, which: int, numbers: tuple[int, ...]) -> int:
        function = _loaded(library(SOURCES)).conv3d_workspace_floats
        function.restype = ctypes.c_int64
        return function(ctypes.byref(_params((0,) * 22, numbers)), ctypes.c_int32(which))

    def cuda_conv3d_plan(self, which: int, numbers: tuple[int, ...], multiprocessors: int = 0) -> list[int]:
        found = (ctypes.c_int64 * 6)()
        params = _params((0,) * 22, numbers)
        which, multiprocessors = ctypes.c_int32(which), ctypes.c_int32(multiprocessors)
        _loaded(library(SOURCES)).conv3d_plan_of(ctypes.byref(params), which, multiprocessors, found)
        return list(found)

    def cuda_conv3d_sm90_plan(self, numbers: tuple[int, ...], multiprocessors: int) -> list[int]:
        return self.cuda_conv3d_plan(0, numbers, multiprocessors)

    def cuda_conv3d_sm90_cluster_plan(self, numbers: tuple[int, ...], multiprocessors: int) -> list[int]:
        return self.cuda_conv3d_plan(1, numbers, multiprocessors)

    def cuda_conv3d(
        self, which: int, addresses: tuple[int, ...], strides: tuple[int, ...], numbers: tuple[int, ...], stream: int
    ) -> None:
        named = zip(native._POINTERS, addresses, strict=True)
        tensors = {name: self.tensors.get(address) for name, address in named}
        call(SOURCES, _ENTRIES[which], _params(strides, numbers), tensors, **self.options)

    def cuda_conv3d_prologue(self, addresses: list[int], numbers: tuple[int, ...], eps: float, stream: int) -> None:
        names = [name for name, _ in _PrologueParams._fields_]
        params = _PrologueParams(eps=eps, **dict(zip(names[6:-1], numbers, strict=True)))
        tensors = {name: self.tensors.get(address) for name, address in zip(names, addresses, strict=False)}
        call(SOURCES, "prologue", params, tensors, **self.options)


def _params(strides: tuple[int, ...], numbers: tuple[int, ...]) -> _Params:
    batch, *rest = map(int, numbers)
    return _Params(strides=(ctypes.c_int64 * 22)(*strides), batch=batch, numbers=(ctypes.c_int32 * 28)(*rest))


@contextlib.contextmanager
def shim(build: str = "ordinary", descending: bool = False, replacement: Library | None = None) -> Iterator[None]:
    """Within the block the native modules run on the shim, and impl="cuda" takes CPU tensors."""
    replacement = replacement or Library(build, descending)
    with pytest.MonkeyPatch.context() as patch:
        for module in (native, conv3d_cuda_sm90, norm_silu_conv3d_cuda):
            patch.setattr(module, "library", lambda: replacement)
        for module in (native, norm_silu_conv3d_cuda):
            patch.setattr(module, "address", replacement.address)
        patch.setattr(registration, "on_cuda", lambda facts: None)
        yield
