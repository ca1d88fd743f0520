"""On a CPU: the networks that `swap_kernels` knows before and after it, the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastvdiff
from benchmarks.memory import peak_bytes
from benchmarks.networks import in_channels_last, leave_no_zeros, output, step
from benchmarks.record import Recorder
from benchmarks.swap_cases import CASES
from benchmarks.timing import Race


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", CASES)
def test_swapped(name: str, training: bool, benchmark: Any, recorder: Recorder) -> None:
    """A forward without a gradient, and a training step's forward and backward."""
    pytest.importorskip("diffusers")
    if benchmark.disabled and training:
        pytest.skip("the forward's check is this one's")
    torch.manual_seed(0)
    eager, inputs = CASES[name]()
    leave_no_zeros(eager, 0.02)
    eager.train(training)
    swapped = copy.deepcopy(eager)
    fastvdiff.swap_kernels(swapped)
    with torch.no_grad():
        difference = float((output(swapped.eval(), inputs) - (y := output(eager.eval(), inputs))).norm() / y.norm())
    assert difference < 1e-4, f"differs from eager by {difference:.1e}"
    if benchmark.disabled:
        return
    eager.train(training)
    swapped.train(training)
    last = in_channels_last(eager)
    providers = {
        "eager": step(eager, inputs, training), "eager channels_last": step(last, inputs, training),
        "fastvdiff": step(swapped, inputs, training),
    }  # fmt: skip
    if recorder.compile:
        torch.compiler.reset()
        providers["torch.compile"] = step(torch.compile(eager), inputs, training)
    race = Race("fastvdiff", providers)
    race.warm_up()
    benchmark.pedantic(race.contend, setup=race.others, rounds=race.rounds(3 * recorder.budget, 3), iterations=1)
    peaks = {f"peak MB {provider}": peak_bytes(providers[provider]) / 1e6 for provider in ("eager", "fastvdiff")}
    recorder.add("swap_kernels", f"{name}-{'training' if training else 'forward'}", race.spreads(), None, peaks)
