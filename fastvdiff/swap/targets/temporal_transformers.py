"""diffusers' transformers over frames: tokens stay where their frame is, instead of moving to their position's row."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from fastvdiff.swap.attention import over_frames, ready, runs_over_frames, unknown
from fastvdiff.swap.frames import as_video, onto
from fastvdiff.swap.target import Target, dropping, kernel_runs, plain, register, untouched, unwatched

from .sequences import norm_silu


def _check_block(block: nn.Module) -> str | None:
    """Why a BasicTransformerBlock is not self-attention, once or twice, and a feed-forward, each after a LayerNorm."""
    if type(block).__name__ != "BasicTransformerBlock":
        return f"its blocks are {type(block).__name__}"
    if block.norm_type != "layer_norm":
        return f"norm_type {block.norm_type!r}"
    if hasattr(block, "fuser") or block.only_cross_attention:
        return "its blocks attend to something else than frames"
    if block.pos_embed is not None and type(block.pos_embed).__name__ != "SinusoidalPositionalEmbedding":
        return f"its positions are {type(block.pos_embed).__name__}"
    if block.attn2 is not None and not block.double_self_attention:
        return "its second attention is to a text"
    return unknown(block.attn1) or (block.attn2 is not None and unknown(block.attn2)) or None


def _check(model: nn.Module) -> str | None:
    if not isinstance(model.norm, nn.GroupNorm):
        return f"norm is {type(model.norm).__name__}, not GroupNorm"
    return next(filter(None, map(_check_block, model.transformer_blocks)), None)


def _ready(block: nn.Module, frames: int) -> bool:
    """Whether this call of a block may be taken apart."""
    if _check_block(block) is not None or not untouched(block) or block._chunk_size is not None:
        return False
    if block.pos_embed is not None and not (untouched(block.pos_embed) and frames <= block.pos_embed.pe.shape[1]):
        return False
    return not dropping(block) and ready(block.attn1) and (block.attn2 is None or ready(block.attn2))


def _run_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A BasicTransformerBlock on tokens (B, T, S, C)."""
    embedding = None if block.pos_embed is None else block.pos_embed.pe[0, : x.shape[1]]
    x = over_frames(block.attn1, block.norm1, x, embedding)
    if block.attn2 is not None:
        x = over_frames(block.attn2, block.norm2, x, embedding)
    return onto(block.ff(block.norm3(x)), x, unwatched(block.ff))


def _sample(model: nn.Module, hidden_states: torch.Tensor, frames: int) -> torch.Tensor | None:
    """The transformer's result, or None where eager has to give it."""
    blocks = list(model.transformer_blocks)
    if hidden_states.dim() != 4 or not all(_ready(block, frames) for block in blocks):
        return None
    rows = hidden_states.permute(0, 2, 3, 1).contiguous()  # a view in channels_last
    video = as_video(rows.permute(0, 3, 1, 2), frames)
    attns = [a for block in blocks for a in (block.attn1, block.attn2) if a is not None]
    norm = model.norm
    if not (plain(norm, nn.GroupNorm) and kernel_runs("group_norm_silu", video, norm.weight, norm.bias)):
        return None
    sizes = (video.shape[0], frames, rows.shape[1] * rows.shape[2])
    if not all(runs_over_frames(a, rows, sizes) for a in attns):
        return None
    normed = norm_silu(video, norm, silu=False)
    x = model.proj_in(normed.permute(0, 2, 3, 4, 1).flatten(2, 3))
    for block in blocks:
        x = _run_block(block, x)
    y = model.proj_out(x).view(rows.shape).permute(0, 3, 1, 2)
    # In the input's memory format: the way back from tokens is this sum.
    return hidden_states + y


def _temporal(
    model: nn.Module, eager: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
    timestep: Any = None, class_labels: Any = None, num_frames: int = 1, cross_attention_kwargs: Any = None,
    return_dict: bool = True,
) -> Any:  # fmt: skip
    y = None
    if encoder_hidden_states is None and not cross_attention_kwargs:
        y = _sample(model, hidden_states, num_frames)
    if y is None:
        return eager(model, hidden_states, encoder_hidden_states, timestep, class_labels, num_frames,
                     cross_attention_kwargs, return_dict)  # fmt: skip
    return sys.modules[eager.__module__].TransformerTemporalModelOutput(sample=y) if return_dict else (y,)


def _animatediff(
    model: nn.Module, eager: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
    timestep: Any = None, class_labels: Any = None, num_frames: int = 1, cross_attention_kwargs: Any = None,
) -> torch.Tensor:  # fmt: skip
    y = None
    if encoder_hidden_states is None and not cross_attention_kwargs:
        y = _sample(model, hidden_states, num_frames)
    if y is None:
        return eager(model, hidden_states, encoder_hidden_states, timestep, class_labels, num_frames,
                     cross_attention_kwargs)  # fmt: skip
    return y


_WHAT = "GroupNorm, and norm + projections + attention over frames, without permuted copies"
register(
    Target(("TransformerTemporalModel",), _WHAT, _check, _temporal, temporal=True),
    Target(("AnimateDiffTransformer3D",), _WHAT, _check, _animatediff, temporal=True),
)
