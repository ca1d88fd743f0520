"""What can be swapped: targets found by class name and structure, so that no target library is imported."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastvdiff import dispatch
from fastvdiff.nn.hooks import untouched
from fastvdiff.ops.registration import autocast_dtype


@dataclass(frozen=True)
class Target:
    """One kind of module, and the forward that runs in place of its own.

    `classes`: class names that are looked for; a subclass counts as long as it has not overridden `forward`.
    `what`: what the kernels do for it, for the report.
    `check(module)`: None where the module's fields are those whose meaning is known; a sentence that says which is
        not; or UNRELATED, which no report mentions. It sees the module once, when it is swapped.
    `forward(module, eager, *args, **kwargs)`: the new forward. `eager` is the class's own, unbound: whatever a call
        brings that is not understood, and whatever no kernel runs, goes to `eager(module, *args, **kwargs)`.
    `temporal`: its activations are those of a temporal layer, which `swap_kernels(gradient_checkpointing=True)`
        recomputes in the backward.
    `covers`: norms and convolutions at most so many levels below it are part of what its forward computes, and not
        reported.
    `calls`: it calls those convolutions, and does not read their parameters.
    `method`: the method that is exchanged; where `forward` wraps another in checkpointing, that other one.
    """

    classes: tuple[str, ...]
    what: str
    check: Callable[[nn.Module], str | None]
    forward: Callable[..., Any]
    temporal: bool = False
    covers: int = 1
    calls: bool = False
    method: str = "forward"


UNRELATED = ""
MARK = "_fastvdiff_swapped"  # of the classes that a swap makes
_IN_FLOAT32 = ("GroupNorm32", "GroupNormSpecific")  # of the latent diffusion family
_TARGETS: list[Target] = []


def register(*targets: Target) -> None:
    """Add targets; where several name a class, the first whose `check` has nothing against the module is taken."""
    _TARGETS.extend(targets)


def targets() -> tuple[Target, ...]:
    """Every target: those of the files in `fastvdiff.swap.targets`, and what has been registered besides."""
    package = importlib.import_module("fastvdiff.swap.targets")
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{found.name}")
    return tuple(_TARGETS)


def class_named(module: nn.Module, names: tuple[str, ...], method: str = "forward") -> str | None:
    """The one of `names` that `module` is an instance of, its `method` unchanged by a subclass."""
    cls = type(module)
    for base in cls.__mro__:
        if base.__name__ in names and base.__module__.partition(".")[0] != "fastvdiff":
            own = getattr(base, method, None)
            return base.__name__ if own is not None and getattr(cls, method) is own else None
    return None


def takes(module: nn.Module, *names: str, method: str = "forward") -> bool:
    """Whether `method` takes arguments of exactly these names: what tells classes of one common name apart."""
    return tuple(inspect.signature(getattr(type(module), method)).parameters) == ("self", *names)


def eager_class(cls: type) -> type:
    """The class below a swapped one, else `cls` itself."""
    return cls.__base__ if MARK in cls.__dict__ else cls


def unwatched(module: nn.Module) -> bool:
    """Whether no hook, on `module` or inside it, can have kept what it returned: its memory is the caller's."""
    return all(untouched(m) for m in module.modules())


def group_norm(module: Any) -> bool:
    """Whether calling `module` is GroupNorm with its own parameters, be it one that computes in float32 by itself."""
    casting = isinstance(module, nn.GroupNorm) and type(module).__name__ in _IN_FLOAT32 and untouched(module)
    return casting or plain(module, nn.GroupNorm)


def plain(module: Any, cls: type) -> bool:
    """Whether calling `module` is nothing but `cls.forward`, so that its parameters may be used without calling it.

    No hook and no subclass: LoRA and quantised layers and parametrisations are subclasses. A swap makes no difference.
    """
    return eager_class(type(module)) is cls and untouched(module)


def silu(module: Any) -> bool:
    """Whether `module` is SiLU, computed out of place."""
    return plain(module, nn.SiLU)


def dropping(module: nn.Module) -> bool:
    """Whether there is a Dropout in `module` that draws random numbers now."""
    return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in module.modules())


def in_own_dtype(x: torch.Tensor) -> bool:
    """Whether an op on x returns x's dtype; where autocast makes it another, torch adds x itself, in float32."""
    return autocast_dtype(x) == x.dtype


def drops_nothing(module: nn.Module) -> bool:
    """Whether `module`, a Dropout or none, is nothing at this call: it need not be called."""
    return (plain(module, nn.Dropout) and not dropping(module)) or plain(module, nn.Identity)


def kernel_runs(op: str, x: torch.Tensor, *parameters: torch.Tensor | None, **options: Any) -> bool:
    """Whether a native kernel, and not plain PyTorch, would run `op` on `x`: where none does, eager stays."""
    facts = dispatch.facts_of(x, dispatch.needs_grad(x, *parameters), **options)
    return dispatch.choose(op, facts, record=False).name != "reference"


def kernel_would_run(op: str, like: torch.Tensor, shape: tuple[int, ...], recorded: bool, **options: Any) -> bool:
    """`kernel_runs` for a contiguous tensor of `shape` that is yet to be computed, on the device of `like`."""
    facts = dispatch.contiguous_facts(like.device.type, like.dtype, shape, recorded, **options)
    return dispatch.choose(op, facts, record=False).name != "reference"
