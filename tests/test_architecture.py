"""The house rules that a test can hold: what csrc includes, what an import costs, what a name resolves to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastvdiff
from fastvdiff import dispatch

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"


def test_csrc_knows_no_torch_and_only_the_bindings_know_pybind11() -> None:
    """One build serves every torch version."""
    for path in CSRC.rglob("*.*"):
        includes = re.findall(r'#include\s*[<"]([^>"]+)', path.read_text())
        assert not [i for i in includes if i.startswith(("torch/", "ATen/", "c10/"))], path
        if path.name not in ("bindings.h", "bindings.cpp", "bindings_cuda.cpp"):
            assert not [i for i in includes if i.startswith("pybind11/")], path
            allowed = ("fastvdiff/", "cuda", "immintrin.h", "dlfcn.h")
            for include in includes:
                standard = "/" not in include and "." not in include
                sibling = (path.parent / include).is_file()
                shim = path.parent.name == "cuda" and include in ("simt.h", "simt_ptx.h")  # tests/simt's, there alone
                assert standard or sibling or shim or include.startswith(allowed), f"{path}: {include}"


def test_importing_fastvdiff_costs_little_beyond_torch() -> None:
    """Public names resolve lazily, and no optional package comes along."""
    program = (
        "import sys, time, torch; before = set(sys.modules); start = time.perf_counter(); import fastvdiff;"
        "took = time.perf_counter() - start; import fastvdiff.ops, fastvdiff.nn;"
        "print(took); print(*{m.partition('.')[0] for m in set(sys.modules) - before})"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
        for _ in range(3)
    ]
    assert min(float(took) for took, _ in runs) < 0.05
    loaded = set(runs[0][1].split())
    assert not loaded & {"triton", "diffusers", "transformers", "av", "PIL", "typer", "rich", "safetensors"}, loaded


@pytest.mark.parametrize("name", fastvdiff.__all__)
def test_every_public_name_resolves(name: str) -> None:
    """A name in __all__ is there."""
    assert getattr(fastvdiff, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As for any module."""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastvdiff.nothing


def test_verified_architectures_have_a_committed_result() -> None:
    """A kernel runs by itself only where a result in benchmarks/results says that it is right."""
    proven: set[tuple[str, str]] = set()
    for file in (ROOT / "benchmarks" / "results").rglob("*.json"):
        record = json.loads(file.read_text())
        for case in record["cases"]:
            if case["correct"]:
                proven.add((record["architecture"], f"{case['op']}.{case['impl']}"))
    for op, impls in dispatch.ops().items():
        for impl in impls:
            for architecture in impl.verified or ():
                assert (architecture, f"{op}.{impl.name}") in proven, f"{op}.{impl.name} on {architecture}"
