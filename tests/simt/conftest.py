"""Ops whose CUDA kernels run on CPU tensors under the SIMT shim."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator

import pytest

from fastvdiff import dispatch, native
from tests.simt import group_norm_silu_library
from tests.simt.host import require_shim


@pytest.fixture
def on_shim(monkeypatch: pytest.MonkeyPatch) -> Iterator[group_norm_silu_library.Library]:
    """Within the test the CUDA kernels take CPU tensors; the library's attributes choose the build and the order."""
    require_shim()
    library = group_norm_silu_library.Library()
    monkeypatch.setattr(native, "library", lambda: library)
    for module in ("group_norm_silu_cuda", "group_norm_silu_cuda_sm90"):
        monkeypatch.setattr(f"fastvdiff.native.{module}.library", lambda: library)
        monkeypatch.setattr(f"fastvdiff.native.{module}.address", library.address)
    monkeypatch.setattr("fastvdiff.native.group_norm_silu_cuda.multiprocessors", lambda x: library.multiprocessors)
    supports = {
        "cuda": lambda facts: None,
        "cuda_sm90": importlib.import_module("fastvdiff.ops.group_norm_silu")._fits_clusters,
    }
    monkeypatch.setitem(dispatch._OPS, "group_norm_silu", tuple(
        dataclasses.replace(impl, supports=supports[impl.name]) if impl.name in supports else impl
        for impl in dispatch._OPS["group_norm_silu"]
    ))  # fmt: skip
    return library
