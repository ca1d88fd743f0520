"""Which implementation of an op runs: the only place that picks a kernel.

Each op registers one ordered tuple of `Impl` records. A call states its `Facts` (device, dtype, sizes: never a value
or an address) and `choose` walks the tuple: the first implementation whose `supports` gives no reason against it
runs, and the last, `reference`, always does. What is asked for by name is strict: it runs or raises.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from . import verified

NAMES = ("reference", "unfused", "cpu", "cpu_winograd", "triton", "cuda", "cuda_sm90", "cuda_sm90_cluster")


class Facts(NamedTuple):
    """What `supports` may look at: everything a fake tensor knows too."""

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    needs_grad: bool
    options: dict[str, Any]


def facts_of(x: torch.Tensor, needs_grad: bool, **options: Any) -> Facts:
    """Facts of a call whose main tensor is `x`; `options` are the op's own sizes and flags."""
    return Facts(x.device.type, x.dtype, tuple(x.shape), x.stride(), needs_grad, options)


def contiguous_facts(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], needs_grad: bool, **options: Any
) -> Facts:
    """Facts of a call whose main tensor is yet to be computed, and will be contiguous."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return Facts(device, dtype, shape, tuple(strides), needs_grad, options)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@dataclass(frozen=True)
class Impl:
    """One implementation of an op.

    `supports(facts)` returns None or a sentence that says why not. `slower(facts)` does the same for the classes of
    calls that measured slower than torch: they run where the implementation is asked for by name, never by themselves.
    `raced(facts)` names the class of a call where only a race on the device itself can tell whether the implementation
    is faster: it runs by itself in the classes that it has won in `fastvdiff verify`, and in no others.
    `untried`: no device has run it yet; it is for who names it, and `fastvdiff verify` leaves it alone.
    `verified` lists the architectures on which the implementation is known to be right from a committed result; None
    means that it needs no such proof (plain torch).
    """

    name: str
    supports: Callable[[Facts], str | None]
    call: Callable[..., Any]
    verified: frozenset[str] | None = None
    slower: Callable[[Facts], str | None] = lambda facts: None
    tf32: bool = False
    raced: Callable[[Facts], str] | None = None
    untried: bool = False


@dataclass
class Walk:
    """How one call was decided: the op, the implementation that ran, its facts, and every other one's reason."""

    op: str
    chosen: str
    facts: Facts
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen} ran"]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


class _State(threading.local):
    """The caller's wishes: an implementation for all ops, or op by op; and the recorder of `explain`."""

    def __init__(self) -> None:
        self.forced: dict[str, str] = dict(_ENVIRONMENT)
        self.walks: list[Walk] | None = None


_OPS: dict[str, tuple[Impl, ...]] = {}
_ENVIRONMENT: dict[str, str] = {}
_WARNED: set[tuple[str, str]] = set()
_state = _State()


def register(op: str, *impls: Impl) -> None:
    """Give `op` its implementations, best first; the last must be `reference`."""
    assert impls[-1].name == "reference", op
    assert all(impl.name in NAMES for impl in impls), op
    _OPS[op] = impls
    if "*" in _ENVIRONMENT and any(impl.name == _ENVIRONMENT["*"] for impl in impls):
        _ENVIRONMENT.setdefault(op, _ENVIRONMENT["*"])
        _state.forced.setdefault(op, _ENVIRONMENT["*"])


def ops() -> dict[str, tuple[Impl, ...]]:
    """Every registered op with its implementations, best first."""
    importlib.import_module("fastvdiff.ops")
    return dict(_OPS)


def _reason_against(op: str, impl: Impl, facts: Facts) -> str | None:
    reason = impl.supports(facts) or impl.slower(facts)
    if reason is None and impl.untried:
        reason = "no device has run it yet: it runs where it is named"
    if reason is None and impl.verified is not None:
        reason = _unverified(f"{op}.{impl.name}", facts, impl.verified)
    if reason is None and impl.raced is not None:
        which = impl.raced(facts)
        if verified.won(f"{op}.{impl.name}", which) not in _FOUND.get(facts.device, ()):
            reason = f"has not won the race on this device: {which}"
    return reason


def _unverified(name: str, facts: Facts, architectures: frozenset[str]) -> str | None:
    here = _CPU if facts.device == "cpu" else verified.architecture(facts.device)
    if here in architectures or name in _FOUND.get(facts.device, ()):
        return None
    return f"not verified on {here} yet: `fastvdiff verify` checks it on this device"


def recall() -> None:
    """Read again what `fastvdiff verify` has found on this machine, and go by that from now on."""
    global _FOUND
    _FOUND = verified.load()


def choose(op: str, facts: Facts, impl: str | None = None, *, record: bool = True) -> Impl:
    """The implementation of `op` that runs a call with these facts; `record` shows it to `trace` and `explain`.

    `impl` (or `use_impl`, or FASTVDIFF_IMPL) asks for one by name, strictly: NotImplementedError lists every
    implementation's reason when it cannot run; ValueError when the op has none of that name.
    """
    candidates = _OPS[op]
    asked = impl if impl is not None else _state.forced.get(op)
    if asked is not None:
        for candidate in candidates:
            if candidate.name == asked:
                if candidate.supports(facts) is None:
                    if record:
                        _record(op, candidate, facts, asked)
                    return candidate
                reasons = "; ".join(f"{c.name}: {c.supports(facts) or 'supported'}" for c in candidates)
                raise NotImplementedError(f"{op}: impl={asked!r} does not run this call ({reasons})")
        known = ", ".join(repr(c.name) for c in candidates)
        raise ValueError(f"{op}: impl: expected one of {known}, got {asked!r}")
    for candidate in candidates:
        reason = _reason_against(op, candidate, facts)
        if reason is None:
            if record:
                _record(op, candidate, facts, None)
            return candidate
        if "fastvdiff verify" in reason:
            _warn_unverified(op, candidate.name, reason)
    raise AssertionError(f"{op}: the reference refused a call")


def watched() -> bool:
    """Whether somebody has asked for an implementation, or to see how calls are decided."""
    return bool(_state.forced) or _state.walks is not None


def would_run(op: str, facts: Facts) -> str:
    """The name of what would run a call with these facts; "reference" where what is asked for does not support it."""
    asked = _state.forced.get(op)
    if asked is not None and all(i.supports(facts) is not None for i in _OPS[op] if i.name == asked):
        return "reference"
    return choose(op, facts, record=False).name


def _warn_unverified(op: str, name: str, reason: str) -> None:
    if not torch.compiler.is_compiling() and (op, name) not in _WARNED:
        _WARNED.add((op, name))
        warnings.warn(f"{op}: the {name} kernel was not used: {reason}", stacklevel=4)


def _record(op: str, chosen: Impl, facts: Facts, asked: str | None) -> None:
    if _state.walks is None:
        return
    walk = Walk(op, chosen.name, facts)
    for candidate in _OPS[op]:
        if candidate is not chosen:
            after = "not asked for" if asked is not None else f"comes after {chosen.name}"
            walk.reasons[candidate.name] = _reason_against(op, candidate, facts) or f"supported, {after}"
    _state.walks.append(walk)


def trace(op: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Walk]:
    """Run `op(*args, **kwargs)` (an op, a module or any callable) and return how each op call in it was decided."""
    before = _state.walks
    _state.walks = []
    try:
        op(*args, **kwargs)
        return _state.walks
    finally:
        _state.walks = before


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Walk]:
    """Run `op(*args, **kwargs)` and print which implementation each op call in it used, and why not the others.

    Args:
        op: an op of `fastvdiff.ops`, a module, or any callable that uses them.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        One `Walk` per op call, in order.
    """
    walks = trace(op, *args, **kwargs)
    for walk in walks:
        print(walk)
    return walks


def _wishes(name: str | None, by_op: dict[str, str]) -> dict[str, str]:
    """Op -> implementation name, with unknown ops and names refused."""
    known = ops()
    wishes: dict[str, str] = {}
    if name is not None:
        wishes = {op: name for op, impls in known.items() if any(i.name == name for i in impls)}
        if not wishes:
            have = sorted({i.name for impls in known.values() for i in impls})
            raise ValueError(f"use_impl: expected an implementation that some op has ({', '.join(have)}), got {name!r}")
    for op, wanted in by_op.items():
        if op not in known:
            raise ValueError(f"use_impl / FASTVDIFF_IMPL: expected an op among {', '.join(sorted(known))}, got {op!r}")
        if all(i.name != wanted for i in known[op]):
            have = ", ".join(i.name for i in known[op])
            raise ValueError(f"use_impl / FASTVDIFF_IMPL: {op}: expected one of {have}, got {wanted!r}")
        wishes[op] = wanted
    return wishes


@contextlib.contextmanager
def use_impl(name: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Within the block, ops run the named implementation, strictly.

    `use_impl("reference")` binds every op that has an implementation of that name and leaves the others alone;
    `use_impl(temporal_attention="cpu", conv3d="reference")` names ops. The choice is the calling thread's own.
    """
    wishes = _wishes(name, by_op)
    before = _state.forced
    _state.forced = {**before, **wishes}
    try:
        yield
    finally:
        _state.forced = before


def wishes() -> dict[str, str]:
    """What `use_impl` and FASTVDIFF_IMPL ask for now on this thread: op -> implementation name."""
    return dict(_state.forced)


@contextlib.contextmanager
def recalled(wishes: dict[str, str]) -> Iterator[None]:
    """Within the block, exactly these wishes hold: for work that runs later, or on another thread, than its caller."""
    before = _state.forced
    _state.forced = dict(wishes)
    try:
        yield
    finally:
        _state.forced = before


def _read_environment(text: str) -> dict[str, str]:
    """FASTVDIFF_IMPL: a name for all ops, or `op=name,op=name`; ops are checked when they register."""
    wishes: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, _, name = part.rpartition("=")
        if name not in NAMES:
            raise ValueError(f"FASTVDIFF_IMPL: expected one of {', '.join(NAMES)} in {part!r}, got {name!r}")
        wishes[op or "*"] = name
    return wishes


def check_environment() -> None:
    """Refuse an op name in FASTVDIFF_IMPL that no op has, or an implementation that the named op lacks."""
    _wishes(None, {op: name for op, name in _ENVIRONMENT.items() if op != "*"})


_CPU = verified.architecture("cpu")
_FOUND: dict[str, frozenset[str]] = verified.load()
_ENVIRONMENT.update(_read_environment(os.environ.get("FASTVDIFF_IMPL", "")))
_state.forced = dict(_ENVIRONMENT)
