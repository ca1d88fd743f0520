"""What fastvdiff._C offers for group_norm_silu's CUDA kernels, with the kernels running under the SIMT shim."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch

from tests.simt.host import call, load, run

SOURCES = (
    "csrc/cuda/group_norm_silu.cu",
    "csrc/cuda/group_norm_silu_resident.cu",
    "tests/simt/group_norm_silu_entry.cpp",
)


class Parameter(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("stride_b", "stride_c", "stride_t")],
        ("dtype", ctypes.c_int32),
    )


class Gradient(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("per_frame", ctypes.c_bool), ("dtype", ctypes.c_int32))


class Params(ctypes.Structure):
    """csrc/include/fastvdiff/group_norm_silu_cuda.h, field by field."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("x", "y", "grad", "dx", "stats", "moments", "workspace")],
        *[(name, Parameter) for name in ("weight", "bias", "scale", "shift")],
        *[(name, Gradient) for name in ("dweight", "dbias", "dscale", "dshift")],
        *[(name, ctypes.c_int64) for name in ("batch", "channels", "positions", "groups", "frames")],
        *[(f"stride_{name}", ctypes.c_int64) for name in ("xb", "xr", "yb", "yr", "gb", "gr")],
        ("eps", ctypes.c_float),
        ("silu", ctypes.c_bool),
        ("channels_last", ctypes.c_bool),
        ("dtype", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
    )


class ResidentParams(ctypes.Structure):
    """What the launcher of clusters takes."""

    _fields_ = (("params", Params), ("groups", ctypes.c_int32), ("ranks", ctypes.c_int32))


class Library:
    """Set `build`, `descending` and `multiprocessors` to choose how the kernels run."""

    cuda_architectures = ("80",)

    def __init__(self) -> None:
        self.build = "ordinary"
        self.descending = False
        self.multiprocessors = 2
        self.cuts: list[tuple[int, int]] = []  # groups of a column and blocks of a cluster, call by call
        self.tensors: dict[int, torch.Tensor] = {}  # by address: what the sanitized build copies

    def address(self, tensor: torch.Tensor | None) -> int:
        """fastvdiff.native.address, remembered."""
        if tensor is None:
            return 0
        self.tensors[tensor.data_ptr()] = tensor
        return tensor.data_ptr()

    def _run(self, entry: str, params: ctypes.Structure) -> None:
        options = {"build": self.build, "descending": self.descending}
        if self.build != "sanitized":
            return run(SOURCES, entry, params, **options)
        given = {name: functools.reduce(getattr, name.split("."), params) for name in _pointers(type(params))}
        call(SOURCES, entry, params, {name: self.tensors.get(at) for name, at in given.items()}, **options)

    def cuda_group_norm_silu_workspace(self, *call: Any) -> int:
        *call, backward = call
        function = load(SOURCES).group_norm_silu_workspace
        function.restype = ctypes.c_int64
        return function(ctypes.byref(_params(*call)), ctypes.c_bool(backward))

    def cuda_group_norm_silu_forward(self, *arguments: Any) -> None:
        *call, _stream, x, parameters, moments, workspace, y, stats, eps = arguments
        params = _with_inputs(_params(*call), x, parameters, moments, workspace)
        params.y, params.stride_yb, params.stride_yr = y
        params.stats, params.eps = stats, eps
        self._run("group_norm_silu_forward", params)

    def cuda_group_norm_silu_resident_forward(self, *arguments: Any) -> bool:
        *call, _stream, x, parameters, moments, y, eps, groups, ranks = arguments
        params = _with_inputs(_params(*call), x, parameters, moments, 0)
        params.y, params.stride_yb, params.stride_yr = y
        params.eps = eps
        takes = load(SOURCES).group_norm_silu_resident_takes
        takes.restype = ctypes.c_bool
        if takes(ctypes.byref(params)):
            self.cuts.append((groups, ranks))
            self._run("group_norm_silu_resident_forward", ResidentParams(params, groups, ranks))
            return True
        return False

    def cuda_group_norm_silu_backward(self, *arguments: Any) -> None:
        *call, _stream, x, parameters, moments, workspace, grad, dx, gradients = arguments
        params = _with_inputs(_params(*call), x, parameters, moments, workspace)
        params.grad, params.stride_gb, params.stride_gr = grad
        params.dx, params.stride_yb, params.stride_yr = dx
        for name, gradient in zip(("dweight", "dbias", "dscale", "dshift"), gradients, strict=True):
            setattr(params, name, Gradient(*gradient))
        self._run("group_norm_silu_backward", params)


def _pointers(structure: Any) -> Iterator[str]:
    """The names of a structure's pointers, those of its inner structures included."""
    for name, kind in structure._fields_:
        if kind is ctypes.c_void_p:
            yield name
        elif issubclass(kind, ctypes.Structure):
            yield from (f"{name}.{inner}" for inner in _pointers(kind))


def _params(sizes: Any, flags: Any, dtype: int, multiprocessors: int) -> Params:
    named = dict(zip(("batch", "channels", "positions", "groups", "frames"), sizes, strict=True))
    silu, channels_last = flags
    return Params(silu=silu, channels_last=channels_last, dtype=dtype, multiprocessors=multiprocessors, **named)


def _with_inputs(params: Params, x: Any, parameters: Any, moments: int, workspace: int) -> Params:
    params.x, params.stride_xb, params.stride_xr = x
    for name, parameter in zip(("weight", "bias", "scale", "shift"), parameters, strict=True):
        setattr(params, name, Parameter(*parameter))
    params.moments, params.workspace = moments, workspace
    return params
