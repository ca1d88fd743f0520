"""Whether a module may be computed without being called."""

from __future__ import annotations

from torch import nn


def untouched(module: nn.Module) -> bool:
    """Whether calling `module` is nothing but its class's `forward`: no hook, no forward put on the instance."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
