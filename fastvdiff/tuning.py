"""Finds the fastest launch configurations of the Triton kernels for a call, and keeps them for later processes.

Nothing else in the package times a kernel: configurations are those shipped with the kernels until this has run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import accuracy, tuned


@dataclass(frozen=True)
class Tuned:
    """What tuning found for one kernel and shape class; milliseconds are those of the whole call."""

    kernel: str
    shape_class: str
    shipped: dict[str, Any]
    best: dict[str, Any]
    shipped_ms: float
    best_ms: float
    refused: dict[str, str]  # a candidate -> why it does not count: too many resources, or another result


def tune(call: Callable[..., Any], *args: Any, save: bool = True, **kwargs: Any) -> list[Tuned]:
    """Time `call(*args, **kwargs)` under every candidate configuration of each Triton kernel that it launches.

    Args:
        call: an op of `fastvdiff.ops`, a module, or any callable; let it run the backward pass too where that counts.
            Its result (a tensor, or a tuple or list of them) under a candidate has to agree with the one under the
            shipped configuration, within four times the floor that the numerics contract gives its dtype.
        *args: its arguments.
        save: keep what was found for later processes (in the user's cache folder, for this device, version and these
            kernels). In this process it holds either way.
        **kwargs: its keyword arguments.

    Returns:
        One `Tuned` per kernel and shape class, in launch order.

    Raises:
        RuntimeError: there is no GPU, or the call launched no Triton kernel.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tune: expected a GPU that torch can use, got none")
    from fastvdiff.kernels import launch

    def run() -> Any:
        return call(*args, **kwargs)

    earlier = tuned.load()
    launch.use_tuned({})  # candidates race against what is shipped
    try:
        expected, launches = _observe(run)
        if not launches:
            raise RuntimeError("tune: the call launched no Triton kernel: fastvdiff.explain says what ran instead")
        found = [_tune_one(run, expected, seen) for seen in launches]
    finally:
        launch.use_tuned(earlier)
    best = {(t.kernel, t.shape_class): t.best for t in found}
    launch.use_tuned({**earlier, **best})
    if save:
        tuned.save(best)
    return found


def _observe(run: Callable[[], Any]) -> tuple[list[torch.Tensor], list[Any]]:
    """The call's result, and each kernel and shape class that it launched once."""
    from fastvdiff.kernels import launch

    with launch.recorded() as launches:
        expected = [t.detach().clone() for t in _tensors(run())]
    return expected, list({(seen.kernel, seen.shape_class): seen for seen in launches}.values())


def _tune_one(run: Callable[[], Any], expected: list[torch.Tensor], seen: Any) -> Tuned:
    """The fastest of one kernel's candidates; the other kernels of the call stay as they are."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from fastvdiff.kernels import launch

    shipped_ms = milliseconds(run)
    best, best_ms, refused = seen.used, shipped_ms, {}
    for candidate in seen.candidates:
        if candidate == seen.used:
            continue
        with launch.trying(seen.kernel, seen.shape_class, candidate):
            try:
                reason = _difference(_tensors(run()), expected)
            except (OutOfResources, PTXASError, CompilationError) as error:  # what this device cannot hold
                reason = str(error).strip().splitlines()[0]
            if reason is not None:
                refused[str(candidate)] = reason
                continue
            took = milliseconds(run)
        if took < best_ms:
            best, best_ms = candidate, took
    return Tuned(seen.kernel, seen.shape_class, seen.used, best, shipped_ms, best_ms, refused)


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> str | None:
    """Why a candidate's result is not the shipped configuration's, or None."""
    for y, exact in zip(found, expected, strict=True):
        if not y.is_floating_point() or not y.numel():
            continue
        error = accuracy.relative_error(y.detach(), exact.double())
        if not error <= 4 * accuracy.FLOORS[y.dtype]:  # a NaN fails too
            return f"another result: relative difference {error:.1e}"
    return None


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for t in result if isinstance(t, torch.Tensor)] if isinstance(result, (tuple, list)) else []


def milliseconds(run: Callable[[], Any]) -> float:
    """Median device time of a call, its inputs out of the L2 cache."""
    from triton.testing import do_bench

    return do_bench(run, warmup=10, rep=60, return_mode="median")
