"""`fastvdiff verify`: every kernel's accuracy and short races on the user's own device, remembered for dispatch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastvdiff import accuracy, dispatch, ops, verified
from fastvdiff.race import race

from . import races
from .examples import EXAMPLES, Draw, Example
from .tables import table_console

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_RACE_SECONDS = 0.6
_RACED = {"cpu": torch.float32, "cuda": torch.bfloat16}


@dataclass
class Outcome:
    """What one implementation did on one example."""

    example: Example
    impl: str
    failures: list[str]
    eager_ms: tuple[float, float]  # forward, forward and backward; the latter nan where there is no gradient
    kernel_ms: tuple[float, float]


def verify() -> None:
    """Check every kernel against float64 on this machine, race it against eager, and remember what passed."""
    console = table_console()
    table = Table(title=f"fastvdiff verify on {verified.device_name(_device())} ({torch.get_num_threads()} threads)")
    for column in ("op", "example", "impl", "accuracy"):
        table.add_column(column)
    for column in ("eager ms", "kernel ms", "speed-up", "with backward"):
        table.add_column(column, justify="right")
    outcomes = []
    with console.status("running every kernel against the reference"):
        for example in EXAMPLES:
            for impl in dispatch.ops()[example.op]:
                if impl.verified is not None and not impl.untried and _runs_here(example, impl.name):
                    outcomes.append(_outcome(example, impl.name))
    for o in outcomes:
        table.add_row(
            o.example.op, o.example.label, o.impl, "; ".join(o.failures) or "passed",
            f"{o.eager_ms[0]:.2f}", f"{o.kernel_ms[0]:.2f}",
            f"{o.eager_ms[0] / o.kernel_ms[0]:.1f}x",
            f"{o.eager_ms[1] / o.kernel_ms[1]:.1f}x" if o.example.training else "",
        )  # fmt: skip
    console.print(table)
    failed = {f"{o.example.op}.{o.impl}" for o in outcomes if o.failures}
    slow = _slow(outcomes) - failed
    passed = {f"{o.example.op}.{o.impl}" for o in outcomes} - failed - slow
    dtype = str(_RACED[_device()])[6:]
    console.print(f"{dtype} times, medians of interleaved runs; eager is the same call with impl='reference'.")
    file = verified.save(_device(), passed, _races(console, passed))
    console.print(f"What passed is kept in {file}")
    if slow:
        console.print(
            f"slower than eager, all in all: {', '.join(sorted(slow))}: not used by themselves on this machine"
        )
    if failed:
        console.print(f"[red]failed: {', '.join(sorted(failed))}[/red]: not used by themselves on this machine")
        raise typer.Exit(1)


def _slow(outcomes: list[Outcome]) -> set[str]:
    """The implementations that lost their races, by the geometric mean over their examples.

    Those with committed results of this architecture are judged by these, those that are raced class by class by that.
    """
    ratios: dict[str, list[float]] = {}
    for o in outcomes:
        (impl,) = (i for i in dispatch.ops()[o.example.op] if i.name == o.impl)
        if impl.raced is None and verified.architecture(_device()) not in (impl.verified or ()):
            pairs = zip(o.eager_ms, o.kernel_ms, strict=True)
            ratios.setdefault(f"{o.example.op}.{o.impl}", []).extend(e / k for e, k in pairs if not math.isnan(k))
    return {name for name, of_name in ratios.items() if statistics.geometric_mean(of_name) < 1}


def _races(console: Console, passed: set[str]) -> list[str]:
    """The races won by the kernels that are chosen by nothing else, each run beside what has passed or won before."""
    outcomes: list[races.Outcome] = []
    for op, impls in races.raced(passed).items():
        verified.save(_device(), passed, races.won(outcomes))
        dispatch.recall()
        with console.status(f"racing {op} against what would run without its kernel"):
            outcomes += [
                races.run(c, impl, _device()) for impl in impls for c in races.contests(op) if c.takes(impl, _device())
            ]
    if outcomes:
        console.print(races.table(outcomes))
    return races.won(outcomes)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _runs_here(example: Example, impl: str) -> bool:
    args, kwargs = example.make(Draw(torch.float32, _device()), False)
    try:
        with torch.set_grad_enabled(example.training):
            getattr(ops, example.op)(*args, **kwargs, impl=impl)
    except NotImplementedError:
        return False
    return True


def _outcome(example: Example, impl: str) -> Outcome:
    failures = [f"{str(dtype)[6:]} {what}" for dtype in _DTYPES for what in _inaccurate(example, impl, dtype)]
    args, kwargs = example.make(Draw(_RACED[_device()], _device()), True)
    run = getattr(ops, example.op)

    def forward(name: str) -> Callable[[], Any]:
        def call() -> None:
            with torch.no_grad():
                run(*args, **kwargs, impl=name)

        return call

    def training(name: str) -> Callable[[], Any]:
        def call() -> None:
            y = run(*args, **kwargs, impl=name)
            y = y[0] if isinstance(y, tuple) else y
            torch.autograd.grad(y.sum(), _leaves(args, kwargs))

        return call

    eager, kernel = race(forward("reference"), forward(impl), _RACE_SECONDS)
    eager_training, kernel_training = (
        race(training("reference"), training(impl), _RACE_SECONDS) if example.training else (math.nan, math.nan)
    )
    return Outcome(example, impl, failures, (eager, eager_training), (kernel, kernel_training))


def _inaccurate(example: Example, impl: str, dtype: torch.dtype) -> Iterator[str]:
    """The outputs and gradients of `impl` that are not as close to float64 as the contract asks."""
    args, kwargs = example.make(Draw(dtype, _device()), False)
    found = _values(example, args, kwargs, impl)
    eager = _values(example, args, kwargs, "reference")
    wide = [_upcast(a) for a in args], {k: _upcast(v) for k, v in kwargs.items()}
    oracle = _values(example, *wide, "reference")
    largest = max((float(t.norm()) for name, t in oracle.items() if name.startswith("gradient")), default=0.0)
    tf32 = any(i.tf32 for i in dispatch.ops()[example.op] if i.name == impl)
    for name, exact in oracle.items():
        gradient = name.startswith("gradient")
        least = accuracy.GRADIENT_SCALE * largest if gradient else 0.0
        ratio = accuracy.GRADIENT_RATIO if gradient else accuracy.FORWARD_RATIO
        allowed = accuracy.limit(accuracy.relative_error(eager[name], exact, least), dtype, ratio, tf32=tf32)
        error = accuracy.relative_error(found[name], exact, least)
        if not error <= allowed:  # a NaN fails too
            yield f"{name}: error {error:.1e} > {allowed:.1e}"


def _upcast(value: Any) -> Any:
    drawn = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().double().requires_grad_(value.requires_grad) if drawn else value


def _leaves(args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.requires_grad]


def _values(example: Example, args: Any, kwargs: dict[str, Any], impl: str) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one call, by name."""
    with torch.set_grad_enabled(example.training):
        result = getattr(ops, example.op)(*args, **kwargs, impl=impl)
    outputs = result if isinstance(result, tuple) else (result,)
    named = {f"output {i}": y for i, y in enumerate(outputs)}
    if not example.training:
        return named
    leaves, outputs = _leaves(args, kwargs), [y for y in outputs if y.requires_grad]  # statistics have no gradient
    cotangents = [torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(torch.bfloat16) for y in outputs]
    grads = torch.autograd.grad(outputs, leaves, [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)])
    return named | {f"gradient {i}": g for i, g in enumerate(grads)}
