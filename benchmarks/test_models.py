"""On a CPU: VideoUNet against itself on the reference: the same weights, eager and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastvdiff
from benchmarks.memory import peak_bytes
from benchmarks.record import Recorder
from benchmarks.targets import against_eager
from benchmarks.timing import Race


@pytest.mark.parametrize(("training", "batch"), [(False, 2), (True, 8)], ids=["forward", "training"])
def test_video_unet(training: bool, batch: int, benchmark: Any, recorder: Recorder) -> None:
    """The "tiny" preset: a guided sampling step's forward, and a training step's forward and backward."""
    torch.manual_seed(0)
    model = fastvdiff.VideoUNet.from_preset("tiny").train(training)
    for parameter in model.parameters():  # away from the zero-initialised projections
        torch.nn.init.normal_(parameter, std=0.05) if not parameter.any() else None
    inputs = (torch.randn(batch, 3, 16, 32, 32), torch.linspace(1, 999, batch), torch.randn(batch, 24, 128))
    name = f"VideoUNet-tiny-batch-{batch}-{'training' if training else 'forward'}"
    with torch.no_grad():
        y = model(*inputs)
        with fastvdiff.use_impl("reference"):
            difference = float((model(*inputs) - y).norm() / y.norm())
    assert difference < 1e-4, f"differs from the reference by {difference:.1e}"
    if benchmark.disabled:
        return
    providers = {
        "eager": _on_reference(_step(model, inputs, training)),
        "fastvdiff": _step(model, inputs, training),
    }
    if recorder.compile:
        torch.compiler.reset()
        providers["torch.compile"] = _on_reference(_step(torch.compile(model), inputs, training))
    race = Race("fastvdiff", providers)
    race.warm_up()
    benchmark.pedantic(race.contend, setup=race.others, rounds=race.rounds(3 * recorder.budget), iterations=1)
    extra = {}
    if training:
        eager, fast = (peak_bytes(providers[provider]) for provider in ("eager", "fastvdiff"))
        extra = {"peak MB eager": eager / 1e6, "peak MB fastvdiff": fast / 1e6}
    recorder.add("VideoUNet", name, race.spreads(), against_eager("cpu", "VideoUNet", name), extra)


def _step(model: Any, inputs: tuple[torch.Tensor, ...], training: bool) -> Callable[[], Any]:
    if not training:

        def forward() -> Any:
            with torch.no_grad():
                return model(*inputs)

        return forward

    target = torch.randn_like(inputs[0])

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.mse_loss(model(*inputs), target).backward()

    return step


def _on_reference(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with fastvdiff.use_impl("reference"):
            return call()

    return run
