"""On a CPU: the networks that `swap_kernels` knows before and after it, the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastvdiff
from benchmarks.memory import peak_bytes
from benchmarks.record import Recorder
from benchmarks.swap_cases import CASES
from benchmarks.timing import Race

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", CASES)
def test_swapped(name: str, training: bool, benchmark: Any, recorder: Recorder) -> None:
    """A forward without a gradient, and a training step's forward and backward."""
    pytest.importorskip("diffusers")
    if benchmark.disabled and training:
        pytest.skip("the forward's check is this one's")
    torch.manual_seed(0)
    eager, inputs = CASES[name]()
    for parameter in eager.parameters():  # away from the zero-initialised convolutions
        nn.init.normal_(parameter, std=0.02) if not parameter.any() else None
    eager.train(training)
    swapped = copy.deepcopy(eager)
    fastvdiff.swap_kernels(swapped)
    with torch.no_grad():
        difference = float((_of(swapped.eval(), inputs) - (y := _of(eager.eval(), inputs))).norm() / y.norm())
    assert difference < 1e-4, f"differs from eager by {difference:.1e}"
    if benchmark.disabled:
        return
    eager.train(training)
    swapped.train(training)
    last = copy.deepcopy(eager)
    for parameter in last.parameters():
        if parameter.dim() in _CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=_CHANNELS_LAST[parameter.dim()])
    providers = {
        "eager": _step(eager, inputs, training), "eager channels_last": _step(last, inputs, training),
        "fastvdiff": _step(swapped, inputs, training),
    }  # fmt: skip
    if recorder.compile:
        torch.compiler.reset()
        providers["torch.compile"] = _step(torch.compile(eager), inputs, training)
    race = Race("fastvdiff", providers)
    race.warm_up()
    benchmark.pedantic(race.contend, setup=race.others, rounds=race.rounds(3 * recorder.budget, 3), iterations=1)
    peaks = {f"peak MB {provider}": peak_bytes(providers[provider]) / 1e6 for provider in ("eager", "fastvdiff")}
    recorder.add("swap_kernels", f"{name}-{'training' if training else 'forward'}", race.spreads(), None, peaks)


def _of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    result = model(**inputs)
    return result[0] if isinstance(result, tuple) else result


def _step(model: nn.Module, inputs: dict[str, Any], training: bool) -> Callable[[], Any]:
    if not training:

        def forward() -> Any:
            with torch.no_grad():
                return _of(model, inputs)

        return forward

    def step() -> None:
        model.zero_grad(set_to_none=True)
        _of(model, inputs).square().mean().backward()

    return step
