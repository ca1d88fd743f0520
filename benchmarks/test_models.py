"""On a CPU: VideoUNet against itself on the reference: the same weights, eager and under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastvdiff
from benchmarks.memory import peak_bytes
from benchmarks.networks import leave_no_zeros, on_reference, output, step
from benchmarks.record import Recorder
from benchmarks.targets import against_eager
from benchmarks.timing import Race


@pytest.mark.parametrize(("training", "batch"), [(False, 2), (True, 8)], ids=["forward", "training"])
def test_video_unet(training: bool, batch: int, benchmark: Any, recorder: Recorder) -> None:
    """The "tiny" preset: a guided sampling step's forward, and a training step's forward and backward."""
    torch.manual_seed(0)
    model = fastvdiff.VideoUNet.from_preset("tiny").train(training)
    leave_no_zeros(model, 0.05)
    inputs = {
        "sample": torch.randn(batch, 3, 16, 32, 32), "timestep": torch.linspace(1, 999, batch),
        "encoder_hidden_states": torch.randn(batch, 24, 128),
    }  # fmt: skip
    name = f"VideoUNet-tiny-batch-{batch}-{'training' if training else 'forward'}"
    with torch.no_grad():
        y = output(model, inputs)
        with fastvdiff.use_impl("reference"):
            difference = float((output(model, inputs) - y).norm() / y.norm())
    assert difference < 1e-4, f"differs from the reference by {difference:.1e}"
    if benchmark.disabled:
        return
    providers = {
        "eager": on_reference(step(model, inputs, training)),
        "fastvdiff": step(model, inputs, training),
    }
    if recorder.compile:
        torch.compiler.reset()
        providers["torch.compile"] = on_reference(step(torch.compile(model), inputs, training))
    race = Race("fastvdiff", providers)
    race.warm_up()
    benchmark.pedantic(race.contend, setup=race.others, rounds=race.rounds(3 * recorder.budget), iterations=1)
    extra = {}
    if training:
        eager, fast = (peak_bytes(providers[provider]) for provider in ("eager", "fastvdiff"))
        extra = {"peak MB eager": eager / 1e6, "peak MB fastvdiff": fast / 1e6}
    recorder.add("VideoUNet", name, race.spreads(), against_eager("cpu", "VideoUNet", name), extra)
