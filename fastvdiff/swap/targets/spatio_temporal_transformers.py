"""Stable Video Diffusion's transformer, of diffusers and of sgm: over positions, then over frames, mixed."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastvdiff.swap.attention import (
    over_frames,
    over_text,
    ready,
    ready_latent,
    runs_over_frames,
    unknown,
    unknown_latent,
)
from fastvdiff.swap.frames import onto
from fastvdiff.swap.target import UNRELATED, Target, dropping, register, takes, untouched, unwatched


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


def _run_block(block: nn.Module, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
    """A block over frames on tokens x (B, T, S, C), with one context (B, L, C_text) for all positions."""
    h = x
    if block.ff_in:
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


def _check_sgm_block(block: nn.Module) -> str | None:
    if type(block).__name__ != "VideoTransformerBlock":
        return f"its blocks are {type(block).__name__}"
    if block.disable_self_attn:
        return "its first attention over frames is to the context"
    if block.switch_temporal_ca_to_sa:
        return "its second attention is over frames as well"
    return unknown_latent(block.attn1) or (block.attn2 is not None and unknown_latent(block.attn2)) or None


def _check_sgm(model: nn.Module) -> str | None:
    if not takes(model, "x", "context", "time_context", "timesteps", "image_only_indicator"):
        return UNRELATED
    if len(model.transformer_blocks) != len(model.time_stack):
        return "it has not one block over frames for each spatial one"
    return next(filter(None, map(_check_sgm_block, model.time_stack)), None)


def _ready_sgm(block: nn.Module, context: torch.Tensor | None) -> bool:
    if _check_sgm_block(block) is not None or not untouched(block) or dropping(block) or not ready_latent(block.attn1):
        return False
    # Without a context the second attention is over frames.
    return block.attn2 is None or (context is not None and ready_latent(block.attn2))


def _forward_sgm(
    model: nn.Module, eager: Any, x: torch.Tensor, context: torch.Tensor | None = None,
    time_context: torch.Tensor | None = None, timesteps: int | None = None,
    image_only_indicator: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    count, _, height, width = x.shape
    blocks, frames = list(model.time_stack), timesteps or 0
    of_time = time_context
    if model.use_spatial_context and context is not None and frames:
        of_time = context[::frames]
    of_time = of_time[:, None] if of_time is not None and of_time.dim() == 2 else of_time
    understood = frames and all(_ready_sgm(block, of_time) for block in blocks)
    if understood:
        sizes = (count // frames, frames, height * width)
        understood = all(runs_over_frames(block.attn1, x, sizes) for block in blocks)
        understood = understood and all(block.timesteps in (None, frames) for block in blocks)
        understood = understood and (of_time is None or len(of_time) == sizes[0])
    if not understood:
        return eager(model, x, context, time_context, timesteps, image_only_indicator)
    h = model.norm(x)
    if model.use_linear:
        h = model.proj_in(h.permute(0, 2, 3, 1).flatten(1, 2))
    else:
        h = model.proj_in(h).permute(0, 2, 3, 1).flatten(1, 2)
    # The same for every sample: B*T rows of a table of T.
    positions = sys.modules[eager.__module__].timestep_embedding(
        torch.arange(frames, device=x.device), model.in_channels, max_period=model.max_time_embed_period
    )
    embedding = model.time_pos_embed(positions.to(h.dtype))
    for spatial, temporal in zip(model.transformer_blocks, blocks, strict=True):
        h = spatial(h, context=context)
        tokens = h.unflatten(0, (-1, frames)) + embedding[:, None]
        if temporal.checkpoint and torch.is_grad_enabled():
            mixed = checkpoint(_run_block, temporal, tokens, of_time, use_reentrant=False)
        else:
            mixed = _run_block(temporal, tokens, of_time)
        h = model.time_mixer(x_spatial=h, x_temporal=mixed.flatten(0, 1), image_only_indicator=image_only_indicator)
    h = model.proj_out(h) if model.use_linear else h
    h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return (h if model.use_linear else model.proj_out(h)) + x


_WHAT = "norm + projections + attention over frames without permuted copies; one context for all positions"
register(
    Target(("TransformerSpatioTemporalModel",), _WHAT, _check, _forward, temporal=True),
    Target(("SpatialVideoTransformer",), _WHAT, _check_sgm, _forward_sgm, temporal=True),
)  # fmt: skip
