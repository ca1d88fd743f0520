"""On a CPU: every op against the eager expression and torch.compile of it, in one interleaved run per case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, CHANNELS_LAST, Case
from benchmarks.record import Recorder
from benchmarks.timing import Race, first, timed
from fastvdiff import accuracy, dispatch


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_op(case: Case, benchmark: Any, recorder: Recorder) -> None:
    """A case that is not right prints FAILED, never a time."""
    tensors = _tensors(case)
    with recorder.correct(case):
        _check(case, tensors)
    if benchmark.disabled:
        return
    other = [t.contiguous(memory_format=CHANNELS_LAST) if t.dim() == 5 else t for t in tensors]
    providers = {"eager": _call(case, case.eager, tensors), "fastvdiff": _call(case, case.fast, tensors)}
    if not case.channels_last and any(t.dim() == 5 for t in tensors):
        providers["eager channels_last"] = _call(case, case.eager, other)
    if case.compiled and recorder.compile:
        torch.compiler.reset()
        providers["torch.compile"] = _call(case, torch.compile(case.eager), tensors)
    race = Race("fastvdiff", providers)
    race.warm_up()
    rounds = race.rounds(recorder.budget)
    benchmark.pedantic(race.contend, setup=race.others, rounds=rounds, iterations=1)
    recorder.add(case.op, case.name, race.spreads(), case.target, impl=_chosen(case, tensors))
    benchmark.extra_info.update({name: s.median for name, s in race.spreads().items()})


def _tensors(case: Case) -> list[torch.Tensor]:
    drawn = case.tensors(torch.Generator().manual_seed(0))
    if case.channels_last:
        drawn = tuple(t.contiguous(memory_format=CHANNELS_LAST) if t.dim() == 5 else t for t in drawn)
    return [t.requires_grad_(case.training) for t in drawn]


def _chosen(case: Case, tensors: list[torch.Tensor]) -> str:
    """The implementation of the case's op that runs it."""
    return next(walk.chosen for walk in dispatch.trace(case.fast, *tensors) if walk.op == case.op)


def _call(case: Case, run: Callable[..., Any], tensors: list[torch.Tensor]) -> Callable[[], Any]:
    return timed(run, [t.detach().requires_grad_(case.training) for t in tensors], case.training)


def _check(case: Case, tensors: list[torch.Tensor]) -> None:
    """The contract of fastvdiff/accuracy.py: output, and gradients in training cases, against float64."""
    found, eager = (_values(case, run, tensors) for run in (case.fast, case.eager))
    oracle = _values(case, case.eager, [t.detach().double().requires_grad_(t.requires_grad) for t in tensors])
    largest = max((float(g.norm()) for g in oracle[1:]), default=0.0)
    for index, exact in enumerate(oracle):
        ratio = accuracy.GRADIENT_RATIO if index else accuracy.FORWARD_RATIO
        least = accuracy.GRADIENT_SCALE * largest if index else 0.0
        allowed = accuracy.limit(accuracy.relative_error(eager[index], exact, least), torch.float32, ratio)
        error = accuracy.relative_error(found[index], exact, least)
        what = f"gradient {index - 1}" if index else "output"
        assert error <= allowed, f"{what}: relative error {error:.2e} > {allowed:.2e}"


def _values(case: Case, run: Callable[..., Any], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    y = first(run(*tensors))
    if not case.training:
        return [y]
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, tensors, cotangent)]
