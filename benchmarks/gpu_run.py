"""One case on a GPU: who takes part, who refuses and why, and what each needs."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import chunked
from benchmarks.device_race import SMALL, Device, DeviceRace
from benchmarks.gpu_case import GpuCase, Tensors
from benchmarks.limits import Limits, floor, target
from benchmarks.record import OnDevice, Row
from benchmarks.timing import timed
from fastvdiff import dispatch

OURS = "fastvdiff "  # followed by the implementation's name
Call = Callable[[], Any]


@dataclass
class Field:
    """Everybody who was asked to run a case."""

    calls: dict[str, Call] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def invite(self, name: str, make: Callable[[], Call]) -> None:
        """Take `name` in if its call can be made and runs; else keep the sentence it refused with."""
        with _every_warning() as said:
            try:
                call = make()
                call()
            except (RuntimeError, NotImplementedError, ValueError) as error:
                self.refused[name] = _sentence(error, [str(w.message) for w in said])
            else:
                self.calls[name] = call


@contextlib.contextmanager
def _every_warning() -> Iterator[list[warnings.WarningMessage]]:
    """Collects warnings within the block; torch says each of its own only once unless it is told otherwise."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield said
    finally:
        torch.set_warn_always(before)


def _sentence(error: Exception, said: list[str]) -> str:
    """An error in one line; torch's attention backends give their reasons as warnings beside it."""
    reasons: list[str] = []
    for text in said:
        if "runtime disabled" in text:  # a backend that was not asked for: its heading goes too
            del reasons[-1:]
        else:
            reasons.append(text.partition(" (Triggered internally")[0].strip())
    lines = [str(error).strip().partition("\n")[0] or type(error).__name__, *reasons]
    return " ".join(dict.fromkeys(lines))[:500]


def implementations(case: GpuCase, tensors: Tensors) -> tuple[list[str], dict[str, str]]:
    """Implementations that run the case by name, verified or not, and the others' sentences; else the reference."""
    run, refused = [], {}
    elsewhere = {"reference"} if tensors[0].is_cpu else {"reference", "cpu"}
    for impl in dispatch.ops()[case.op]:
        if impl.name not in elsewhere:
            try:
                with torch.no_grad():
                    case.fast(*tensors, impl=impl.name)
            except NotImplementedError as error:
                refused[OURS + impl.name] = _own_reason(error, impl.name)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # it says that it runs this: the check will record what happens
                run.append(impl.name)
            else:
                run.append(impl.name)
    return run or ["reference"], refused


def _own_reason(error: NotImplementedError, impl: str) -> str:
    """What dispatch's list of everybody's reasons says about `impl`."""
    found = re.search(rf"[(;] ?{impl}: (.*?)(?:; (?:{'|'.join(dispatch.NAMES)}): |\)$)", str(error))
    return found[1] if found else _sentence(error, [])


def check(case: GpuCase, tensors: Tensors, impls: list[str]) -> tuple[dict[str, str], list[Row]]:
    """What was compared, by implementation that is right, and a FAILED row for each that is not."""
    checked, failed = {}, []
    for impl in impls:
        try:
            checked[impl] = chunked.check(case, tensors, impl)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            failure = _sentence(error, []) if isinstance(error, chunked.Wrong) else f"{type(error).__name__}: {error}"
            failed.append(Row(case.op, impl, case.name, False, failure=failure.partition("\n")[0]))
    return checked, failed


def invite(case: GpuCase, tensors: Tensors, impls: list[str], compiled: bool) -> Field:
    """Eager in the case's format and in channels_last, torch.compile of it, the case's baselines, and ours."""
    found = Field()

    def provider(run: Callable[..., Any], inputs: Tensors) -> Callable[[], Call]:
        return lambda: timed(run, case.leaves(inputs), case.training)

    found.invite("eager", provider(case.eager, tensors))
    if not case.channels_last and any(t.dim() == 5 for t in tensors):
        found.invite("eager channels_last", provider(case.eager, case.in_format(tensors, True)))
    if case.channels_last and case.other_format:
        found.invite("eager contiguous", provider(case.eager, case.in_format(tensors, False)))
    if compiled and case.compile_mode is not None:
        torch.compiler.reset()
        mode = None if case.compile_mode == "default" else case.compile_mode
        found.invite("torch.compile", provider(torch.compile(case.eager, mode=mode, dynamic=False), tensors))
    ready: dict[Any, Tensors] = {}
    for name, baseline in case.baselines.items():
        if baseline.prepare not in ready:
            with torch.no_grad():
                ready[baseline.prepare] = baseline.prepare(tensors)
        found.invite(name, provider(baseline.run, ready[baseline.prepare]))
    for impl in impls:
        run = _bound(case.fast, impl)
        found.invite(OURS + impl, provider(run, tensors))
    return found


def _bound(fast: Callable[..., Any], impl: str) -> Callable[..., Any]:
    return lambda *tensors: fast(*tensors, impl=impl)


def measure(
    case: GpuCase, tensors: Tensors, device: Device, limits: Limits, *, compiled: bool,
    drive: Callable[[DeviceRace], None] | None,
) -> list[Row]:  # fmt: skip
    """A row per implementation of the case: checked first, and raced by `drive` if it is right; None only checks."""
    with _convolutions_in(case):
        impls, refused = implementations(case, tensors)
        checked, made = check(case, tensors, impls)
        if drive is not None and checked:
            with best_convolutions():
                made += _raced(case, tensors, device, limits, checked, refused, compiled, drive)
    return made


def _raced(
    case: GpuCase, tensors: Tensors, device: Device, limits: Limits, checked: dict[str, str], refused: dict[str, str],
    compiled: bool, drive: Callable[[DeviceRace], None],
) -> list[Row]:  # fmt: skip
    """Rows of the implementations that are right; one that will not run what it was timed with is FAILED."""
    found = invite(case, tensors, list(checked), compiled)
    failures = {impl: found.refused[OURS + impl] for impl in checked if OURS + impl in found.refused}
    made = [Row(case.op, impl, case.name, False, failure=failure) for impl, failure in failures.items()]
    checked = {impl: sentence for impl, sentence in checked.items() if impl not in failures}
    if not checked:
        return made
    found.refused |= refused
    returned = {name: _bytes_of(call()) for name, call in found.calls.items()}
    peaks = {name: device.peak_bytes(call) for name, call in found.calls.items()}
    race = DeviceRace(device, OURS + next(iter(checked)), found.calls)
    race.prepare()
    drive(race)
    if sum(t.numel() * t.element_size() for t in tensors) < SMALL:
        race.warm()
    return made + rows(case, race, found, checked, limits, peaks, returned)


def _bytes_of(result: Any) -> int:
    """The memory of what a call gives back."""
    tensors = result if isinstance(result, tuple) else (result,)
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@contextlib.contextmanager
def _convolutions_in(case: GpuCase) -> Iterator[None]:
    """Everybody's float32 convolutions may multiply as tf32 within the block if that is the case's subject."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32" if case.tf32 else before
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@contextlib.contextmanager
def best_convolutions() -> Iterator[None]:
    """cuDNN tries its algorithms for what is timed, not for the float64 that it is checked with."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def rows(
    case: GpuCase, race: DeviceRace, found: Field, checked: dict[str, str], limits: Limits, peak_bytes: dict[str, int],
    result_bytes: dict[str, int],
) -> list[Row]:  # fmt: skip
    """A row per implementation: everybody's times beside its own, which is called "fastvdiff"."""
    made = []
    times, warm, lowest = race.spreads(), race.warm_spreads(), floor(case.work, limits)
    for impl, sentence in checked.items():
        mine = OURS + impl

        def of(values: dict[str, Any], mine: str = mine) -> dict[str, Any]:
            others = {name: value for name, value in values.items() if not name.startswith(OURS)}
            return {**others, "fastvdiff": values[mine]} if mine in values else others

        device = OnDevice(
            bytes_moved=case.work.moved, bytes_least=case.work.least, flops=case.work.flops,
            floor_us=lowest.us, binds=lowest.binds, target_us=target(case.work, case.target_us, limits),
            headline=case.headline, checked=sentence, warm=of(warm), refused=found.refused,
            peak_bytes=of(peak_bytes), result_bytes=of(result_bytes),
            launched=[n.replace(mine, "fastvdiff") for n in race.launched],
        )  # fmt: skip
        made.append(Row(case.op, impl, case.name, True, of(times), device=device))
    return made
