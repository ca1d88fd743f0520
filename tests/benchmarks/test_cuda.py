"""The stopwatch on a real device."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import gpu_run
from benchmarks.cuda import Cuda
from benchmarks.device_race import DeviceRace
from benchmarks.gpu_case import GpuCase
from benchmarks.limits import DEVICES
from tests.benchmarks.small_cases import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ, reason="graphs need torch's caching allocator"
    ),
]  # fmt: skip


def test_rates_and_facts_are_plausible() -> None:
    device = Cuda()
    limits = device.limits()
    assert 5e10 < limits.copy < 2e13
    assert 1e12 < limits.matrix < 5e15
    assert 0.1 < device.empty_us() < 100
    assert device.facts()["architecture"].startswith("sm_")


def test_a_cold_copy_runs_no_faster_than_memory() -> None:
    """Without a flush 16 MB would come out of the L2."""
    device = Cuda()
    limits = device.limits()
    source = torch.randn(4 << 20, device="cuda")
    target = torch.empty_like(source)
    race = DeviceRace(device, "copy", {"copy": lambda: target.copy_(source)})
    race.prepare()
    for _ in range(20):
        race.round()
    race.warm()
    seconds = race.spreads()["copy"].median / 1e3
    assert source.nbytes / seconds < 1.1 * limits.copy  # its reads alone, for writes may end in the L2
    assert race.warm_spreads()["copy"].median < race.spreads()["copy"].median


def test_what_synchronises_is_launched_and_the_rest_still_captured() -> None:
    x = torch.ones(1000, device="cuda")
    race = DeviceRace(Cuda(), "plain", {"reads back": lambda: x.sum().item(), "plain": lambda: x * 2})
    race.prepare()
    race.round()
    assert race.launched == ["reads back"]
    assert torch.randn(3, device="cuda").shape == (3,)  # nothing was left in the middle of a capture
    assert all(times[0] > 0 for times in race.milliseconds.values())


def test_peak_memory_is_what_a_call_adds() -> None:
    x = torch.ones(8 << 20, device="cuda")
    assert Cuda().peak_bytes(lambda: x * 2) == x.nbytes
    assert Cuda().peak_bytes(lambda: x.mul_(2)) == 0


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_small_case_from_check_to_row(case: GpuCase) -> None:
    def drive(race: DeviceRace) -> None:
        for _ in range(3):
            race.round()

    rows = gpu_run.measure(case, case.draw("cuda"), Cuda(), DEVICES["h200"], compiled=False, drive=drive)
    assert rows
    for row in rows:
        assert row.correct, row.failure
        assert row.impl != "cpu"
        assert row.times["fastvdiff"].median > 0
        assert row.times["eager"].median > 0
        assert "fastvdiff" not in row.device.launched
        assert row.device.peak_bytes["fastvdiff"] > 0
