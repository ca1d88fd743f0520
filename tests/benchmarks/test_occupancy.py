"""Blocks per multiprocessor: by hand, and of the kernels as they are compiled."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks import conv3d_tiles, occupancy
from benchmarks.multiprocessors import MULTIPROCESSORS, Resources
from benchmarks.record import ROOT
from fastvdiff import native

H200 = MULTIPROCESSORS["h200"]


@pytest.mark.parametrize(
    ("needs", "blocks", "share"),
    [
        (Resources(256, 128, 0), 2, 0.25),  # 65536 registers are two blocks'
        (Resources(256, 129, 0), 1, 0.125),  # a warp's come in units of 256: 136 a thread
        (Resources(256, 32, 100 * 1024), 2, 0.25),  # 228 KiB, of which each block costs one more
        (Resources(256, 32, 114 * 1024), 1, 0.125),
        (Resources(256, 32, 0), 8, 1.0),  # 2048 threads
        (Resources(32, 16, 0), 32, 0.5),  # blocks
    ],
)
def test_the_scarcest_resource_decides(needs: Resources, blocks: int, share: float) -> None:
    assert needs.blocks(H200) == blocks
    assert needs.share(H200) == share


@pytest.mark.parametrize("device", ["h200", "a100"])
def test_convolutions_hold_as_many_blocks_as_their_waves_are_counted_with(device: str) -> None:
    """What benchmarks.conv3d_tiles takes for granted, against the registers and shared memory of the build."""
    if not native.cuda_architectures():
        pytest.skip("built without CUDA: nvcc was not found")
    here = MULTIPROCESSORS[device]
    usage = occupancy.cuda_usage(here.architecture)
    for conv, dtype in conv3d_tiles.CONVOLUTIONS:
        for (which, by), plan in conv3d_tiles.rows(conv, dtype, here).items():
            whole = conv3d_tiles.in_whole_accesses(conv, which)
            _, needs = occupancy.convolution(usage, which, by, plan, dtype, whole)
            most = conv3d_tiles.blocks_by_registers(conv, which, plan, dtype)
            counted = conv3d_tiles.occupancy(plan, 1, here, most).resident
            assert counted == here.count * needs.blocks(here), (conv.label, dtype, which, by)


def test_a_case_s_kernels_are_compiled_and_counted() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.occupancy", "--select", "temporal_attention-svd-l3-contiguous"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()[1:]]
    kernels = {line[1] for line in lines if line[0].endswith("-forward")}
    assert kernels
    assert {line[1] for line in lines if line[0].endswith("-training")} > kernels  # the backward's besides
    for line in lines:
        threads, registers, shared, blocks = map(int, line[3:7])
        assert blocks == Resources(threads, registers, shared).blocks(H200) >= 1
