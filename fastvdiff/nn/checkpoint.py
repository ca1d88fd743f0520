"""Activation checkpointing that recomputes on the implementations of the forward pass."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from fastvdiff import dispatch


def checkpoint(module: nn.Module, *args: Any) -> Any:
    """`module(*args)`, keeping only the inputs and running it again in the backward pass.

    Equivalent to `torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)`, except that `use_impl` holds
    for the second run as it did for the first: autograd runs it later, and on CUDA on a thread of its own, and another
    implementation would save other tensors than those that the backward pass expects.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
    """
    if torch.compiler.is_compiling():
        # The graph holds the chosen implementations already.
        return torch_checkpoint(module, *args, use_reentrant=False)
    wishes = dispatch.wishes()
    return torch_checkpoint(
        module,
        *args,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), dispatch.recalled(wishes)),
    )
