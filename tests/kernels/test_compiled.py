"""The kernels as GPUs would run them, compiled ahead of time: registers, shared memory and instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .offline import SHARED_MEMORY

ROOT = Path(__file__).parents[2]
Record = dict[str, Any]
# What spills some values and is the fastest configuration measured on an H100 all the same.
FASTER_WITH_SPILLS = {("temporal_attention-svd-l0-channels_first", "temporal_attention_bwd_kernel")}


@pytest.fixture(scope="module", params=["ordinary", pytest.param("all", marks=pytest.mark.long)])
def compiled(request: pytest.FixtureRequest) -> dict[str, list[Record]]:
    """Architecture -> what each kernel of compiled_cases.py became there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = {
        architecture: subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.offline", architecture, request.param],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for architecture in SHARED_MEMORY
    }  # fmt: skip
    found = {}
    for architecture, process in processes.items():
        output, errors = process.communicate()
        assert process.returncode == 0, f"{architecture}: {errors}"
        found[architecture] = [json.loads(line) for line in output.splitlines()]
    return found


@pytest.fixture(params=SHARED_MEMORY)
def records(request: pytest.FixtureRequest, compiled: dict[str, list[Record]]) -> list[Record]:
    """The kernels of one architecture."""
    return compiled[request.param]


def test_nothing_spills(records: list[Record]) -> None:
    """Every shipped configuration keeps its values in registers, but for those that were measured."""
    assert records
    spilled = [r for r in records if r["local"] or r["stack"] or r["stl"]]
    measured = FASTER_WITH_SPILLS if records[0]["architecture"] != "sm_80" else set()
    unknown = [r for r in spilled if (r["case"], r["kernel"]) not in measured]
    assert not unknown, "\n".join(map(str, unknown))


def test_shared_memory_fits(records: list[Record]) -> None:
    """Triton itself refuses a kernel that does not: this holds the table of limits against it."""
    assert max(r["shared"] for r in records) <= SHARED_MEMORY[records[0]["architecture"]]


@pytest.mark.parametrize("op", ["temporal_attention-", "temporal_attention_block-"])
def test_attention_runs_on_tensor_cores(records: list[Record], op: str) -> None:
    """No bfloat16 attention kernel multiplies on the ordinary units."""
    kernels = [r for r in records if r["case"].startswith(op) and "fp32" not in r["case"] and "_fwd" in r["kernel"]]
    assert kernels
    assert all(r["hmma"] + r["hgmma"] + r["tcgen"] for r in kernels), kernels


@pytest.mark.parametrize(
    "case",
    [
        "group_norm_silu-svd-l0-channels_last",
        "group_norm_silu-svd-l0-contiguous",
        "temporal_attention-svd-l0",
        "temporal_attention-animatediff-l0",
        "geglu-svd-l0",
        "ddim_step-small",
        "ddim_step-256MB-noise",
    ],
)
def test_wide_accesses(records: list[Record], case: str) -> None:
    """Memory-bound kernels read and write 16 bytes a thread where the layout allows it."""
    kernels = [r for r in records if r["case"] == case and "_fwd" in r["kernel"]]
    assert kernels
    assert all(r["ldg128"] for r in kernels), kernels
    assert any(r["stg128"] for r in kernels), kernels
