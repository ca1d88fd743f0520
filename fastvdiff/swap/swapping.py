"""`swap_kernels`: walk a model, put kernels behind what is understood, and say what was left alone."""

from __future__ import annotations

from torch import nn

from fastvdiff import checks

from . import classes
from .report import Entry, SwapReport
from .target import UNRELATED, Target, class_named, targets

_OP = "swap_kernels"
_LAYERS = (nn.GroupNorm, nn.Conv3d)  # what the forward of the block around them takes care of
_ORDER_UNSEEN = (
    "not beside a SiLU in a Sequential, nor in a block that is known: what follows it is decided in code that"
    " cannot be seen from here"
)


def swap_kernels(model: nn.Module, *, gradient_checkpointing: bool = False) -> SwapReport:
    """Put fastvdiff's kernels behind the modules of a model that somebody else wrote.

    Modules are found by class name and structure: diffusers' video U-Nets and video autoencoders, and in any module
    torch's Conv3d, and GroupNorm with SiLU in a Sequential. Each keeps its parameters, buffers, hooks, module path and
    state_dict keys, and stays an instance of its class; `train()`, LoRA, gradient checkpointing, autocast, DDP, FSDP2
    and torch.compile go on working. What is not understood is left alone, with a reason in the report. A call that a
    kernel does not support, or gives to its reference, takes the module's own forward.

    Args:
        model: the model, changed in place.
        gradient_checkpointing: recompute the temporal layers in the backward, for models whose own flag skips them.

    Returns:
        What was replaced and what was refused; `undo()` takes it back, `verify(*inputs)` checks and times it.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        checks.fail(_OP, "model", "a torch.nn.Module (a pipeline's network, such as pipe.unet)",
                    checks.describe(model), TypeError)  # fmt: skip
    report = SwapReport(model)
    known = targets()
    covered: set[str] = set()
    read: set[str] = set()  # of those, by a forward that takes their parameters and does not call them
    for path, module in list(model.named_modules()):
        if path in read and type(module) is nn.Conv3d:
            continue
        target, reason = _find(module, known)
        if target is not None:
            classes.swap(module, target, gradient_checkpointing and target.temporal, target.method)
            report.add(path, module, Entry(path, type(module).__name__, target.what))
        elif reason and not (path in covered and isinstance(module, _LAYERS)):
            report.refused.append(Entry(path, type(module).__name__, reason))
        around = target or classes.target_of(module)
        if around is not None:
            below = {f"{path}.{name}" if path else name for name in _below(module, around.covers)}
            covered |= below
            read |= set() if around.calls else below
    return report


def _below(module: nn.Module, levels: int) -> list[str]:
    """The paths of what is at most `levels` below `module`."""
    return [name for name, _ in module.named_modules() if name and name.count(".") < levels]


def _find(module: nn.Module, known: tuple[Target, ...]) -> tuple[Target | None, str | None]:
    """The target of a module, or the reason why it stays as it is; neither where no kernel has to do with it."""
    if classes.is_swapped(module):
        return None, "swapped already"
    if type(module).__module__.startswith("fastvdiff."):
        return None, None  # it runs the kernels by itself
    reasons = []
    for target in known:
        if class_named(module, target.classes, target.method) is None:
            continue
        if "forward" in module.__dict__ or target.method in module.__dict__:
            return None, "another forward has been put on this instance"
        try:
            reason = target.check(module)
        except AttributeError as error:  # a version of the library whose class has other fields
            reason = f"its fields are not those that are known: {error}"
        if reason is None:
            return target, None
        if reason not in (UNRELATED, *reasons):
            reasons.append(reason)
    if reasons:
        return None, "; ".join(reasons)
    if isinstance(module, nn.GroupNorm):
        return None, _ORDER_UNSEEN
    return None, None
