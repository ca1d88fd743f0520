"""The check of a swap: every replaced module on the inputs it really gets, both ways, forward and backward."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from fastvdiff import accuracy
from fastvdiff.race import race

from . import classes
from .tables import rendered

_DTYPES = tuple(accuracy.FLOORS)
# A whole network's error is what every layer below has lost, which adds up or cancels: beside eager's worst, not
# tensor by tensor. Over every target and three draws of the parameters no gradient was above 2.9 times eager's worst,
# and that in an autoencoder on one clip, whose convolutions torch gives to im2col on a CPU, 2 to 3 times as exact as
# oneDNN, which runs them here, and for two clips in torch too. Video U-Nets needed 1.2, 16-bit weights 2.2.
WHOLE_RATIO = 3.0
# The error of one draw is itself drawn: torch's LayerNorm has weight gradients in bfloat16 between 0.5 and 2.1 times as
# exact with its rows in another order. What does not pass in one draw of the results' gradients is measured over these.
DRAWS = 8


@dataclass
class Measured:
    """One module, before and after the swap: relative errors against float64, milliseconds and bytes.

    `backward_*` is the largest error of any gradient, inputs and parameters; nan where there is none. Where one draw of
    the results' gradients does not pass, an error is the root mean square over several. Times are medians of one
    forward, and of one forward and backward. `bytes_*` is the peak of a training step on CUDA; on a CPU, what
    autograd keeps for the backward.
    """

    path: str
    what: str
    forward_before: float
    forward_after: float
    backward_before: float
    backward_after: float
    forward_ms: tuple[float, float]
    training_ms: tuple[float, float]
    bytes: tuple[int, int]
    failures: list[str]


@dataclass
class Verification:
    """What `SwapReport.verify` found; a table when printed."""

    modules: list[Measured]

    @property
    def passed(self) -> bool:
        """Whether every output and gradient is within the numerics contract."""
        return not any(m.failures for m in self.modules)

    def __rich__(self) -> Any:
        """The table, for rich."""
        from rich.table import Table

        table = Table(title="every replaced module, eager / swapped", title_justify="left")
        for column in ("module", "class"):
            table.add_column(column)
        for column in ("forward error", "gradient error", "forward ms", "training ms", "MB kept"):
            table.add_column(column, justify="right")
        table.add_column("accuracy")
        for m in self.modules:
            table.add_row(
                m.path or "(the model)", m.what, f"{m.forward_before:.1e} / {m.forward_after:.1e}",
                f"{m.backward_before:.1e} / {m.backward_after:.1e}", "{:.2f} / {:.2f}".format(*m.forward_ms),
                "{:.2f} / {:.2f}".format(*m.training_ms), "{:.2f} / {:.2f}".format(*(b / 1e6 for b in m.bytes)),
                "; ".join(m.failures) or "passed",
            )  # fmt: skip
        return table

    def __str__(self) -> str:
        return rendered(self)


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def verify(
    model: nn.Module, modules: dict[str, nn.Module], inputs: tuple[Any, ...], kwargs: dict[str, Any], seconds: float,
    whole: bool = True,
) -> Verification:  # fmt: skip
    """Check and time each of `modules`, and the `whole` model, on what they get when the model runs on `inputs`."""
    parts = {path: module for path, module in modules.items() if path}
    calls = _captured(model, parts, inputs, kwargs)
    measured = [_measure(path, parts[path], call, seconds) for path, call in calls.items()]
    return Verification([*measured, _measure("", model, _Call(inputs, kwargs), seconds)] if whole else measured)


def _captured(
    model: nn.Module, modules: dict[str, nn.Module], inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, _Call]:
    """The first call of each module when the model runs: detached copies, so that nothing changes them."""
    calls: dict[str, _Call] = {}

    def recorder(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in calls:
                calls[path] = _Call(*tree_map(_detached, (args, kwargs)))

        return record

    # Eagerly: a swapped block uses the layers inside it without calling them.
    handles = [m.register_forward_pre_hook(recorder(p), with_kwargs=True) for p, m in modules.items()]
    try:
        with classes.eager(model), torch.no_grad():
            model(*inputs, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _twins(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A copy of the module with its own forward, and one with the kernels'; dropout draws nothing in either."""
    swapped = copy.deepcopy(module)
    for layer in swapped.modules():
        if "Dropout" in type(layer).__name__:
            layer.train(False)
    eager = copy.deepcopy(swapped)
    classes.restore_all(eager)
    return eager, swapped


def _measure(path: str, module: nn.Module, call: _Call, seconds: float) -> Measured:
    eager, swapped = _twins(module)
    dtype, drawn = _errors(eager, swapped, call, 0)
    errors, failures = drawn, _failures(drawn, dtype, whole=not path)
    if failures:
        errors = root_mean_square([drawn, *(_errors(eager, swapped, call, seed)[1] for seed in range(1, DRAWS))])
        failures = _failures(errors, dtype, whole=not path)
    forward, backward = (
        tuple(max((e[i] for name, e in errors.items() if _is_gradient(name) == g), default=math.nan) for i in (0, 1))
        for g in (False, True)
    )
    runs = [(_forward(m, call), _training(m, call)) for m in (eager, swapped)]
    times = [race(*pair, seconds, least=3) if seconds else (math.nan, math.nan) for pair in zip(*runs, strict=True)]
    values = (*module.parameters(), *tree_flatten((call.args, call.kwargs))[0])
    on_cuda = any(isinstance(value, torch.Tensor) and value.is_cuda for value in values)
    kept = tuple(_kept(training, on_cuda) for _, training in runs)
    return Measured(path, type(module).__name__, *forward, *backward, *times, kept, failures)


def _errors(
    eager: nn.Module, swapped: nn.Module, call: _Call, seed: int
) -> tuple[torch.dtype, dict[str, tuple[float, float]]]:
    """The dtype computed in, and (eager's error, the swapped module's) of every output and gradient, by name."""
    wide = copy.deepcopy(eager).double()
    exact = _values(wide, _Call(*tree_map(_widened, (call.args, call.kwargs))), seed)
    before, after = _values(eager, call, seed), _values(swapped, call, seed)
    dtype = next((t.dtype for t in before.values() if t.dtype in _DTYPES), torch.float32)
    largest = max((float(t.norm()) for name, t in exact.items() if _is_gradient(name)), default=0.0)
    least = {True: accuracy.GRADIENT_SCALE * largest, False: 0.0}
    return dtype, {
        name: tuple(accuracy.relative_error(found[name], t, least[_is_gradient(name)]) for found in (before, after))
        for name, t in exact.items()
    }


def _failures(errors: dict[str, tuple[float, float]], dtype: torch.dtype, whole: bool) -> list[str]:
    worst = {
        g: max((e[0] for name, e in errors.items() if _is_gradient(name) == g), default=0.0) for g in (False, True)
    }
    failures = []
    for name, (plain, error) in errors.items():
        ratio = accuracy.GRADIENT_RATIO if _is_gradient(name) else accuracy.FORWARD_RATIO
        allowed = accuracy.limit(*((worst[_is_gradient(name)], dtype, WHOLE_RATIO) if whole else (plain, dtype, ratio)))
        if not error <= allowed:  # a NaN fails too
            failures.append(f"{name}: {error:.1e} > {allowed:.1e}")
    return failures


def _is_gradient(name: str) -> bool:
    return name.startswith("gradient")


def root_mean_square(drawn: list[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """By name, eager's and the other's error over several draws of the same call."""
    return {
        name: tuple(math.sqrt(sum(errors[name][i] ** 2 for errors in drawn) / len(drawn)) for i in (0, 1))
        for name in drawn[0]
    }


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _leaves(call: _Call) -> tuple[_Call, dict[str, torch.Tensor]]:
    """The call with every floating tensor a fresh leaf, and those leaves by name."""
    leaves: dict[str, torch.Tensor] = {}

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach()
        if value.is_floating_point():
            leaves[f"input {len(leaves)}"] = value.requires_grad_(True)
        return value

    return _Call(*tree_map(fresh, (call.args, call.kwargs))), leaves


def _run(module: nn.Module, call: _Call) -> Any:
    """One call; frames that a streaming module keeps for its next call are as before."""
    kept = [
        (m.__dict__, name, value)
        for m in module.modules()
        for name, value in m.__dict__.items()
        if value is None or isinstance(value, torch.Tensor)
    ]
    result = module(*call.args, **call.kwargs)
    for attributes, name, value in kept:
        attributes[name] = value
    return result


def _outputs(result: Any) -> list[torch.Tensor]:
    values = result.values() if isinstance(result, dict) else tree_flatten(result)[0]
    return [t for t in values if isinstance(t, torch.Tensor)]


def _values(module: nn.Module, call: _Call, seed: int) -> dict[str, torch.Tensor]:
    """Outputs, with and without a gradient recorded, and gradients of one call, by name; `seed` draws the latter."""
    with torch.no_grad():
        inference = {f"inference output {i}": y for i, y in enumerate(_outputs(_run(module, call)))}
    call, leaves = _leaves(call)
    leaves |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        outputs = _outputs(_run(module, call))
        named = inference | {f"output {i}": y for i, y in enumerate(outputs)}
        heads = [y for y in outputs if y.requires_grad]
        if not heads or not leaves:
            return named
        grads = torch.autograd.grad(heads, list(leaves.values()), _cotangents(heads, seed), allow_unused=True)
    zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(leaves.values(), grads, strict=True))
    return named | {f"gradient of {name}": g for name, g in zip(leaves, zeros, strict=True)}


def _cotangents(outputs: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """The same numbers in every dtype: rounded to bfloat16 first."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(y.shape, generator=generator) for y in outputs]
    return [d.to(torch.bfloat16).to(y.device, y.dtype) for d, y in zip(draws, outputs, strict=True)]


def _forward(module: nn.Module, call: _Call) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            _run(module, call)

    return run


def _training(module: nn.Module, call: _Call) -> Callable[[], Any]:
    call, leaves = _leaves(call)
    wanted = [*leaves.values(), *(p for p in module.parameters() if p.requires_grad)]

    def run() -> None:
        with torch.enable_grad():
            heads = [y for y in _outputs(_run(module, call)) if y.requires_grad]
            if heads and wanted:
                torch.autograd.grad(heads, wanted, [torch.ones_like(y) for y in heads], allow_unused=True)

    return run


def _kept(training: Callable[[], Any], on_cuda: bool) -> int:
    """Peak bytes of a training step on CUDA; on a CPU, what autograd keeps, parameters and inputs included once."""
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        training()
        return torch.cuda.max_memory_allocated()
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        training()
    return sum(storages.values())
