"""On a GPU: every op at the standard shapes, in bfloat16 and device time, against everybody who runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import gpu_run
from benchmarks.cuda import Cuda
from benchmarks.device_race import CLOCK, DeviceRace
from benchmarks.gpu_case import GpuCase
from benchmarks.gpu_cases import CASES
from benchmarks.limits import Limits
from benchmarks.record import Recorder
from benchmarks.targets import covering


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.goals] if covering("cuda", case.op, case.name) else [])
        for case in CASES
    ],
)
def test_gpu(case: GpuCase, benchmark: Any, recorder: Recorder, gpu: tuple[Cuda, Limits]) -> None:
    """A case that is not right prints FAILED, never a time; its other implementations are still measured."""
    device, limits = gpu

    def drive(race: DeviceRace) -> None:
        benchmark.pedantic(race.round, rounds=race.rounds(recorder.budget), iterations=1)
        benchmark.extra_info.update({name: spread.median for name, spread in race.spreads().items()})

    try:
        rows = gpu_run.measure(
            case, case.draw("cuda"), device, limits, compiled=recorder.compile,
            drive=None if benchmark.disabled else drive,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        pytest.skip(f"needs more memory than this device has: {str(error).partition('.')[0]}")
    finally:
        device.end_if_lost()
        device.release()
    recorder.rows += rows
    recorder.save()  # now: what is measured outlives a session that is cut short
    wrong = [row for row in rows if not row.correct]
    if wrong:
        pytest.fail("; ".join(f"{row.impl}: {row.failure}" for row in wrong), pytrace=False)
