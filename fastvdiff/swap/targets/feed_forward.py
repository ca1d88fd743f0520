"""The gated activation of transformers' feed-forward layers, in space and over frames: every family calls it GEGLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvdiff.ops import geglu
from fastvdiff.swap.target import UNRELATED, Target, kernel_would_run, register


def _check(model: nn.Module) -> str | None:
    if not isinstance(getattr(model, "proj", None), nn.Module):
        return UNRELATED
    gelu = getattr(type(model), "gelu", None)
    return None if gelu is None or gelu.__qualname__ == "GEGLU.gelu" else "its gelu is not GEGLU's own"


def _forward(model: nn.Module, eager: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """h * gelu(gate), (h, gate) the halves of the projection, which is called: LoRA and quantised layers go on."""
    understood = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
    if not understood or not kernel_would_run("geglu", args[0], args[0].shape, torch.is_grad_enabled()):
        return eager(model, *args, **kwargs)
    return geglu(model.proj(args[0]))


register(Target(("GEGLU",), "h * gelu(gate) in one pass", _check, _forward, covers=0))
