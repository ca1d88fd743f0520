"""Stable Video Diffusion's transformer: over positions, then over frames, mixed."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from fastvdiff.swap.attention import over_frames, over_text, ready, runs_over_frames, unknown
from fastvdiff.swap.frames import onto
from fastvdiff.swap.target import Target, dropping, register, untouched, unwatched


def _check_block(block: nn.Module) -> str | None:
    if type(block).__name__ != "TemporalBasicTransformerBlock":
        return f"its blocks are {type(block).__name__}"
    return unknown(block.attn1) or (block.attn2 is not None and unknown(block.attn2)) or None


def _check(model: nn.Module) -> str | None:
    if len(model.transformer_blocks) != len(model.temporal_transformer_blocks):
        return "it has not one temporal block for each spatial one"
    return next(filter(None, map(_check_block, model.temporal_transformer_blocks)), None)


def _ready(block: nn.Module) -> bool:
    known = _check_block(block) is None and untouched(block) and block._chunk_size is None
    return known and not dropping(block) and ready(block.attn1) and (block.attn2 is None or ready(block.attn2))


def _run_block(block: nn.Module, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """A TemporalBasicTransformerBlock on tokens x (B, T, S, C), with one context (B, L, C_text) for all positions."""
    h = block.ff_in(block.norm_in(x))
    if block.is_res:
        h = onto(h, x, unwatched(block.ff_in))
    h = over_frames(block.attn1, block.norm1, h)
    if block.attn2 is not None:
        h = onto(h, over_text(block.attn2, block.norm2(h).flatten(1, 2), context).unflatten(1, h.shape[1:3]))
    y = block.ff(block.norm3(h))
    return onto(y, h, unwatched(block.ff)) if block.is_res else y


def _forward(
    model: nn.Module, eager: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
    image_only_indicator: torch.Tensor | None = None, return_dict: bool = True,
) -> Any:  # fmt: skip
    frames = image_only_indicator.shape[-1] if image_only_indicator is not None else 0
    blocks = list(model.temporal_transformer_blocks)
    count, _, height, width = hidden_states.shape
    understood = frames and encoder_hidden_states is not None and all(map(_ready, blocks))
    if understood:
        sizes = (count // frames, frames, height * width)
        understood = all(runs_over_frames(block.attn1, hidden_states, sizes) for block in blocks)
    if not understood:
        return eager(model, hidden_states, encoder_hidden_states, image_only_indicator, return_dict)
    batch = count // frames
    context = encoder_hidden_states.unflatten(0, (batch, frames))[:, 0]
    x = model.norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2)
    x = model.proj_in(x)
    # The same for every sample: B*T rows of a table of T.
    positions = torch.arange(frames, device=x.device)
    embedding = model.time_pos_embed(model.time_proj(positions).to(x.dtype))
    for spatial, temporal in zip(model.transformer_blocks, blocks, strict=True):
        if torch.is_grad_enabled() and model.gradient_checkpointing:
            x = model._gradient_checkpointing_func(spatial, x, None, encoder_hidden_states, None)
        else:
            x = spatial(x, encoder_hidden_states=encoder_hidden_states)
        tokens = x.unflatten(0, (batch, frames))
        mixed = _run_block(temporal, tokens + embedding[:, None], context)
        x = model.time_mixer(x_spatial=x, x_temporal=mixed.flatten(0, 1), image_only_indicator=image_only_indicator)
    y = model.proj_out(x).unflatten(1, (height, width)).permute(0, 3, 1, 2)
    y = hidden_states + y
    return sys.modules[eager.__module__].TransformerTemporalModelOutput(sample=y) if return_dict else (y,)


register(
    Target(("TransformerSpatioTemporalModel",), "norm + projections + attention over frames without permuted copies;"
           " one context for all positions", _check, _forward, temporal=True),
)  # fmt: skip
