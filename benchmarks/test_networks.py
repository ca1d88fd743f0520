"""On a GPU: whole networks at their published sizes, in bfloat16, before and after the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import network_run
from benchmarks.cuda import Cuda
from benchmarks.device_race import CLOCK, DeviceRace
from benchmarks.limits import Limits
from benchmarks.published import DIFFUSERS, NETWORKS, Network
from benchmarks.record import Recorder


@pytest.mark.networks
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.name)
def test_network(case: Network, benchmark: Any, recorder: Recorder, gpu: tuple[Cuda, Limits]) -> None:
    """Forward, or a training step's forward and backward: time and peak memory."""
    if case.op == DIFFUSERS:
        pytest.importorskip("diffusers", reason="the published networks are diffusers' own classes")
    device, _ = gpu

    def drive(race: DeviceRace) -> None:
        rounds = race.rounds(10 * recorder.budget, least=5, most=30)
        benchmark.pedantic(race.round, rounds=rounds, iterations=1)

    try:
        row = network_run.measure(
            case, "cuda", device, compiled=recorder.compile, drive=None if benchmark.disabled else drive
        )
    except torch.OutOfMemoryError as error:
        pytest.skip(f"needs more memory than this device has: {str(error).partition('.')[0]}")
    finally:
        device.end_if_lost()
        device.release()
    if row.times or not row.correct:
        recorder.rows.append(row)
        recorder.save()
    if not row.correct:
        pytest.fail(row.failure, pytrace=False)
