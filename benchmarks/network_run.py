"""One whole network on a GPU: checked against float32, then timed as a user launches it, host included."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import fastvdiff
from benchmarks.device_race import Device, DeviceRace
from benchmarks.gpu_run import Field, best_convolutions
from benchmarks.networks import in_channels_last, leave_no_zeros, on_reference, output, step
from benchmarks.published import DIFFUSERS, Network
from benchmarks.record import Row
from benchmarks.targets import against_eager
from fastvdiff import accuracy, dispatch

# In one draw the errors of a deep chain of layers add up or cancel: up to 1.6 of eager's was seen where the root mean
# square over draws was 0.9. The contract itself is held op by op and module by module; this finds what is wrong.
_RATIO = 2.0


def compiled_name(network: Network) -> str:
    """What torch.compile is called in the tables."""
    mode = network.compile_mode
    return "torch.compile" if mode == "default" else f"torch.compile {mode}"


def measure(
    network: Network, where: str, device: Device, *, compiled: bool, drive: Callable[[DeviceRace], None] | None
) -> Row:
    """The network's row; `drive` races the providers, None only checks. One that is wrong is FAILED, without a time."""
    model, inputs = _built(network, where)
    fast = model
    if network.op == DIFFUSERS:
        fast = copy.deepcopy(model)
        fastvdiff.swap_kernels(fast)
    with as_after_verify(where):
        failure = _failure(network, model, fast, inputs)
        if failure or drive is None:
            return Row(network.op, "triton", network.name, not failure, failure=failure)
        with best_convolutions():
            return _raced(network, model, fast, inputs, device, compiled, drive)


def _built(network: Network, where: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    with torch.device(where):
        model, inputs = network.build(network.batch)
        leave_no_zeros(model, 0.02)
    if network.checkpointed:
        model.enable_gradient_checkpointing()
    return model.to(torch.bfloat16).train(network.training), _to(inputs, torch.bfloat16)


def _to(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _failure(network: Network, eager: nn.Module, fast: nn.Module, inputs: dict[str, Any]) -> str:
    """What is wrong with the output of a forward; empty if nothing is."""
    was_training = eager.training
    with torch.no_grad(), _exact_products():
        exact = on_reference(lambda: output(copy.deepcopy(eager).float().eval(), _to(inputs, torch.float32)))()
        plain = on_reference(lambda: output(eager.eval(), inputs))()
        found = output(fast.eval(), inputs)
    for model in (eager, fast):
        model.train(was_training)
    error, allowed = accuracy.relative_error(found, exact), accuracy.relative_error(plain, exact)
    allowed = accuracy.limit(allowed, torch.bfloat16, _RATIO)
    return "" if error <= allowed else f"output: relative error {error:.2e} > {allowed:.2e}"  # a NaN fails too


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """float32 is not rounded to tf32 within the block."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@contextlib.contextmanager
def as_after_verify(where: str) -> Iterator[None]:
    """Kernels run by themselves within the block, as where `fastvdiff verify` has passed: what is timed is checked."""
    before = dispatch._FOUND
    # Those that a race of their own decides on stay out: who won it is not known here.
    passed = {f"{op}.{impl.name}" for op, impls in dispatch.ops().items() for impl in impls}
    dispatch._FOUND = {**before, where: before.get(where, frozenset()) | passed}
    try:
        yield
    finally:
        dispatch._FOUND = before


def _raced(
    network: Network, eager: nn.Module, fast: nn.Module, inputs: dict[str, Any], device: Device, compiled: bool,
    drive: Callable[[DeviceRace], None],
) -> Row:  # fmt: skip
    """Eager, eager in channels_last, torch.compile of that, and fastvdiff; who lacks memory declines."""
    training, found, last = network.training, Field(), in_channels_last(eager)
    found.invite("eager", lambda: on_reference(step(eager, inputs, training)))
    found.invite("eager channels_last", lambda: on_reference(step(last, inputs, training)))
    found.invite("fastvdiff", lambda: step(fast, inputs, training))
    if compiled and network.compile_mode is not None:
        torch.compiler.reset()
        run = torch.compile(last, mode=network.compile_mode, dynamic=False)
        found.invite(compiled_name(network), lambda: on_reference(step(run, inputs, training)))
    if "fastvdiff" not in found.calls:
        return Row(network.op, "triton", network.name, False, failure=found.refused["fastvdiff"])
    peaks = {f"peak MB {name}": device.peak_bytes(call) / 1e6 for name, call in found.calls.items()}
    race = DeviceRace(device, "fastvdiff", found.calls, captured=False)
    race.prepare()
    drive(race)
    return Row(
        network.op, "triton", network.name, True, race.spreads(), against_eager("cuda", network.op, network.name),
        extra=peaks, refused=found.refused,
    )  # fmt: skip
