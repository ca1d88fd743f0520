"""The TemporalTransformer of ModelScope and VideoCrafter: tokens stay where their frame is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastvdiff.swap.attention import over_frames, ready_latent, runs_over_frames, unknown_latent
from fastvdiff.swap.frames import onto
from fastvdiff.swap.target import (
    UNRELATED,
    Target,
    dropping,
    kernel_runs,
    plain,
    register,
    takes,
    untouched,
    unwatched,
)

from .sequences import norm_silu


def _check_block(block: nn.Module) -> str | None:
    if type(block).__name__ != "BasicTransformerBlock":
        return f"its blocks are {type(block).__name__}"
    return unknown_latent(block.attn1) or unknown_latent(block.attn2)


def _check(model: nn.Module) -> str | None:
    if not takes(model, "x", "context") or not isinstance(model.norm, nn.GroupNorm):
        return UNRELATED
    if not model.only_self_att:
        return "it attends to a text as well"
    if getattr(model, "multiply_zero", False):
        return "it is for images: its result is multiplied by zero"
    if not all(_projects(layer) for layer in (model.proj_in, model.proj_out)):
        return "its projections are not linear layers or convolutions of one position"
    return next(filter(None, map(_check_block, model.transformer_blocks)), None)


def _projects(layer: nn.Module) -> bool:
    """Whether a layer is linear over channels, its parameters its own."""
    if plain(layer, nn.Conv1d):
        return layer.kernel_size == layer.stride == (1,) and layer.padding == (0,) and layer.groups == 1
    return plain(layer, nn.Linear)


def _project(layer: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


def _ready(block: nn.Module) -> bool:
    """Whether this call of a block may be taken apart."""
    known = type(block).__name__ == "BasicTransformerBlock" and untouched(block) and not dropping(block)
    return known and all(unknown_latent(attn) is None and ready_latent(attn) for attn in (block.attn1, block.attn2))


def _run_block(block: nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A BasicTransformerBlock on tokens (B, T, S, C), both its attentions over frames; mask (B, T, T) bool or None."""
    x = over_frames(block.attn1, block.norm1, x, attn_mask=mask)
    x = over_frames(block.attn2, block.norm2, x, attn_mask=mask)
    return onto(block.ff(block.norm3(x)), x, unwatched(block.ff))


def _mask(model: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """(B, T, T) bool, True where a frame may attend, or None."""
    if not getattr(model, "causal_attention", False):
        return None
    return (model.mask > 0.5).to(x.device).expand(x.shape[0], -1, -1)


def _forward(model: nn.Module, eager: Any, x: torch.Tensor, context: Any = None) -> torch.Tensor:
    """x + proj_out(blocks(proj_in(norm(x)))), the norm over the clip, attention over frames."""
    norm, blocks = model.norm, list(model.transformer_blocks)
    understood = x.dim() == 5 and plain(norm, nn.GroupNorm) and _projects(model.proj_in) and _projects(model.proj_out)
    if not understood or not all(map(_ready, blocks)):
        return eager(model, x, context)
    batch, _, frames, height, width = x.shape
    mask, sizes = _mask(model, x), (batch, frames, height * width)
    understood = all(runs_over_frames(attn, x, sizes) for block in blocks for attn in (block.attn1, block.attn2))
    rows = x.permute(0, 2, 3, 4, 1).contiguous()  # a view where the frames are in channels_last
    video = rows.permute(0, 4, 1, 2, 3)
    if mask is not None and tuple(mask.shape[1:]) != (frames, frames):
        understood = False
    if not understood or not kernel_runs("group_norm_silu", video, norm.weight, norm.bias):
        return eager(model, x, context)
    y = _project(model.proj_in, norm_silu(video, norm, silu=False).permute(0, 2, 3, 4, 1).flatten(2, 3))
    for block in blocks:
        # ModelScope's blocks have the flag, and no `_forward` that they would checkpoint.
        if torch.is_grad_enabled() and block.checkpoint and hasattr(block, "_forward"):
            y = checkpoint(_run_block, block, y, mask, use_reentrant=False)
        else:
            y = _run_block(block, y, mask)
    y = _project(model.proj_out, y).view(rows.shape).permute(0, 4, 1, 2, 3)
    # In training contiguous, as eager's: a memory format decides where a Dropout further on puts its random numbers.
    # Else in the input's format: the way back from tokens is this sum.
    return y.contiguous() + x if model.training else x + y


register(
    Target(("TemporalTransformer",), "GroupNorm, and norm + projections + attention over frames, without permuted"
           " copies", _check, _forward, temporal=True),
)  # fmt: skip
