"""What conv3d launches, as the launcher says, against tiles counted by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import conv3d_tiles, gpu_cases, traffic
from benchmarks.gpu_convolutions import Convolution
from benchmarks.limits import DEVICES
from benchmarks.shapes import SVD
from fastvdiff.native import conv3d_cuda_sm90, conv3d_cuda_sm90_cluster
from fastvdiff.native.conv3d_cuda import Geometry, Plan, plans

from .conv3d_library import shim

H200, A100 = (conv3d_tiles.MULTIPROCESSORS[name] for name in ("h200", "a100"))


@pytest.fixture(autouse=True)
def _on_shim() -> Iterator[None]:
    with shim():
        yield


def test_blocks_and_steps_counted_by_hand() -> None:
    """320 channels take 5 columns of 64, not 3 of 128; positions are tiled across samples."""
    found = conv3d_tiles.rows(Convolution(SVD[0], (1, 3, 3)), torch.bfloat16, A100)
    assert {by for _, by in found} == {"cuda"}
    positions = 2 * 25 * 72 * 128
    for name in ("forward", "data_gradient"):
        assert found[name, "cuda"][:3] == (128, 64, 64)
        assert found[name, "cuda"].blocks == positions // 128 * 5
        assert found[name, "cuda"].steps == found[name, "cuda"].blocks * 9 * 320 // 64
    gradient = found["weight_gradient", "cuda"]
    assert gradient[:3] == (128, 128, 64)
    tiles = 3 * -(-9 * 320 // 128)
    assert gradient.blocks % tiles == 0
    assert gradient.steps == tiles * positions // 64


def test_a_strided_data_gradient_skips_the_taps_that_meet_nothing() -> None:
    geometry = Geometry((1, 2, 2), (0, 0, 1, 1, 1, 1), (1, 1, 1), (False,) * 3)
    found = plans(1, 64, 64, (1, 32, 32), (1, 4, 4), geometry, torch.float32)
    assert found["forward"].blocks == 2
    assert found["forward"].steps == 2 * 16 * 64 // 32
    assert found["data_gradient"].blocks == 4 * 2
    assert found["data_gradient"].steps == 4 * 2 * 4 * 64 // 32  # 4 of the 16 taps in each of the 4 classes


def test_the_kernel_for_9_0_counted_by_hand() -> None:
    """320 channels are two columns of 160; a multiprocessor holds one block, and its waves are of tiles."""
    found = conv3d_tiles.rows(Convolution(SVD[0], (1, 3, 3)), torch.bfloat16, H200)
    positions = 2 * 25 * 72 * 128
    for name in ("forward", "data_gradient"):
        plan = found[name, "sm90"]
        assert plan[:3] == (128, 160, 64)
        assert plan.blocks == positions // 128 * 2
        assert plan.steps == plan.blocks * 9 * 320 // 64
        assert conv3d_tiles.occupancy(plan, 1, H200).resident == 132
    assert ("weight_gradient", "sm90") not in found


def test_clusters_counted_by_hand() -> None:
    """Tiles of 256 positions where there are many; the second of a pair may lie past the last position."""
    same = Geometry((1, 1, 1), (0, 0, 1, 1, 1, 1), (1, 1, 1), (False,) * 3)

    def plan(batch: int, channels: int, *size: int) -> Plan:
        found = conv3d_cuda_sm90_cluster.plans(batch, channels, channels, size, (1, 3, 3), same, torch.bfloat16, 132)
        assert found["forward"] == found["data_gradient"]
        return found["forward"]

    svd = plan(2, 320, 25, 72, 128)
    assert svd[:3] == (256, 160, 64)
    assert svd.blocks == 2 * 25 * 72 * 128 // 256 * 2
    assert svd.steps == svd.blocks * 9 * 320 // 64
    small = plan(1, 128, 5, 8, 8)
    assert small.tile_rows == 128
    assert small.blocks == 4 * 128 // small.tile_columns  # 320 positions: three tiles, and one past them


def test_passes_of_the_kernel_for_9_0() -> None:
    """Strides leave the data gradient to the portable kernel; a causal one comes out at x's size."""
    strided = Geometry((1, 2, 2), (0, 0, 1, 1, 1, 1), (1, 1, 1), (False,) * 3)
    assert set(conv3d_cuda_sm90.plans(1, 64, 64, (1, 32, 32), (1, 4, 4), strided, torch.bfloat16, 132)) == {"forward"}
    causal = Geometry((1, 1, 1), (2, 0, 1, 1, 1, 1), (1, 1, 1), (False,) * 3)
    found = conv3d_cuda_sm90.plans(1, 128, 64, (5, 32, 32), (3, 3, 3), causal, torch.float16, 132)
    assert found["data_gradient"].tile_columns in (64, 128)
    assert found["data_gradient"].steps == found["data_gradient"].blocks * 27
    assert found["data_gradient"].blocks * 128 * found["data_gradient"].tile_columns == 5 * 32 * 32 * 128
    assert not conv3d_cuda_sm90.plans(1, 64, 3, (5, 32, 32), (3, 3, 3), causal, torch.float16, 132)


def test_occupancy_and_its_table() -> None:
    work = traffic.conv3d(2, 320, 320, SVD[0].clip[2:], (1, 3, 3))
    plan = conv3d_tiles.rows(Convolution(SVD[0], (1, 3, 3)), torch.bfloat16, H200)["forward", "cuda"]
    found = conv3d_tiles.occupancy(plan, work.flops, H200)
    assert found.useful == 1.0
    assert found.resident == 264
    assert found.waves == pytest.approx(plan.blocks / 264 / -(-plan.blocks // 264))
    large = plan._replace(shared_bytes=96 * 1024)
    assert conv3d_tiles.occupancy(large, work.flops, A100).resident == 108
    lines = conv3d_tiles.table("h200", DEVICES["h200"]).splitlines()
    # Three passes on the portable kernels, two on the other: of every kernel at 14 levels, and of what else the cases
    # have: 3 or 4 channels and tf32 only on the portable ones, a stride's data gradient too.
    assert len(lines) == 2 + 5 * 4 * 14 + 3 * 6 + 4 * 3 + 3 * 3
    assert "svd-l0 1x3x3" in lines[7]


def test_every_convolution_that_is_measured_is_in_the_table() -> None:
    shown = {f"{conv.label}{' tf32' if dtype == torch.float32 else ''}" for conv, dtype in conv3d_tiles.CONVOLUTIONS}
    for case in gpu_cases.CASES:
        if case.op.endswith("conv3d"):
            label = case.label
            for around in (" epilogue", " stats norm", " stats", " resnet block"):
                label = label.removesuffix(around)
            assert label in shown


def test_the_weight_gradient_in_tf32_has_a_multiprocessor_to_itself() -> None:
    plan = conv3d_tiles.rows(Convolution(SVD[0], (1, 3, 3)), torch.float32, H200)["weight_gradient", "cuda"]
    assert conv3d_tiles.occupancy(plan, 1, H200, 1).resident == 132
