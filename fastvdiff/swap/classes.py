"""How a module gets another forward and stays itself: a class of its own, made on top of the one it has.

The module object is kept, and with it its parameters, buffers, hooks, path and state_dict keys; `isinstance`, the
class's name and its signature are those of before. A forward put on the instance would hide from pickle and from
`copy.deepcopy`; a new module in its place would break every reference that an optimizer, a hook or a wrapper holds.
torch.nn.utils.parametrize and FSDP2 exchange classes in the same way, and can do so before or after.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from .target import MARK, Target, eager_class


def swap(module: Any, target: Target, recompute: bool, method: str = "forward") -> None:
    """Put the target's forward behind `module` (or behind another `method` of an object that is no module)."""
    module.__class__ = _swapped_class(type(module), target, recompute, method)


def restore(module: nn.Module) -> bool:
    """Give `module` back the class it had; False where it has not been swapped."""
    cls = type(module)
    if MARK in cls.__dict__:
        module.__class__ = cls.__base__
        return True
    if not is_swapped(module):
        return False
    # Something has put a class of its own on top since, as fully_shard does: it stays, on the class of before.
    bases = tuple(b.__base__ if MARK in b.__dict__ else b for b in cls.__bases__)
    if bases == cls.__bases__:
        raise RuntimeError(f"{cls.__name__}: a class two levels above the swapped one; undo what was put on top first")
    own = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls)(cls.__name__, bases, own)
    return True


def restore_all(model: nn.Module) -> None:
    """Give every module of `model`, or of a copy of it, back the class it had."""
    for module in model.modules():
        restore(module)


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Within the block, every module of `model` runs its own forward."""
    swapped = [(m, type(m)) for m in model.modules() if is_swapped(m)]
    for module, _ in swapped:
        restore(module)
    try:
        yield
    finally:
        for module, cls in swapped:
            module.__class__ = cls


def target_of(module: nn.Module) -> Target | None:
    """The target whose forward the module runs."""
    return getattr(type(module), MARK, None)


def is_swapped(module: nn.Module) -> bool:
    """Whether the module runs a target's forward."""
    return any(MARK in base.__dict__ for base in type(module).__mro__)


@functools.cache
def _swapped_class(base: type, target: Target, recompute: bool, method: str) -> type:
    eager = getattr(base, method)
    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_to_eager,
        method: _checkpointed(target, eager) if recompute else _forward(target, eager),
        MARK: target,
    }
    if issubclass(base, nn.Module) and not hasattr(base, "__deepcopy__"):
        body["__deepcopy__"] = _deepcopy
    return type(base)(base.__name__, (base,), body)


def _forward(target: Target, eager: Any) -> Any:
    run = target.forward

    @functools.wraps(eager)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch_module._has_any_global_hook() or not hasattr(self, MARK):
            # Whoever watches every module wants to see those that a kernel would pass over; and accelerate's hooks keep
            # the bound method that they found, which outlives the swap.
            return eager(self, *args, **kwargs)
        return run(self, eager, *args, **kwargs)

    return forward


def _checkpointed(target: Target, eager: Any) -> Any:
    plainly = _forward(target, eager)

    @functools.wraps(eager)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(plainly, self, *args, use_reentrant=False, **kwargs)
        return plainly(self, *args, **kwargs)

    return forward


def _reduce_to_eager(self: nn.Module, protocol: int) -> Any:
    """What is pickled is the module as it was: such a file loads where fastvdiff is not installed."""
    # Protocol 1 names the class as a plain argument; from 2 on pickle insists on the object's own.
    function, arguments, *rest = object.__reduce_ex__(self, 1)
    return (function, tuple(eager_class(a) if isinstance(a, type) else a for a in arguments), *rest)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy runs the kernels too."""
    twin = type(self).__new__(type(self))
    memo[id(self)] = twin
    twin.__setstate__(copy.deepcopy(self.__dict__, memo))
    return twin
