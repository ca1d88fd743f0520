"""The original AnimateDiff: motion modules, and ResNet blocks on videos, their GroupNorm over a clip or each frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvdiff.swap.attention import over_frames, runs_over_frames
from fastvdiff.swap.frames import as_frames, as_video, dense, for_batch, onto
from fastvdiff.swap.target import (
    UNRELATED,
    Target,
    dropping,
    drops_nothing,
    kernel_runs,
    plain,
    register,
    silu,
    takes,
    untouched,
    unwatched,
)

from .sequences import norm_silu

_INFLATED = "InflatedGroupNorm"


def _inflated(norm: Any) -> bool:
    """Whether calling `norm` is GroupNorm over each frame of a video, with its own parameters."""
    return isinstance(norm, nn.GroupNorm) and type(norm).__name__ == _INFLATED and untouched(norm)


def _known(norm: Any) -> bool:
    return _inflated(norm) or plain(norm, nn.GroupNorm)


def _runs(x: torch.Tensor, norm: nn.GroupNorm) -> bool:
    """Whether `norm`, over the clip or each frame of x (B, C, T, H, W), has a kernel."""
    # All frames have one shape: the batch of them is not made to ask.
    return kernel_runs("group_norm_silu", x[:, :, 0] if _inflated(norm) else x, norm.weight, norm.bias)


def _normed(
    x: torch.Tensor, norm: nn.GroupNorm, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None,
    as_eager: bool = False,
) -> torch.Tensor:  # fmt: skip
    """SiLU(norm(x) * (1 + scale) + shift), over the clip or each frame of x (B, C, T, H, W); scale, shift (B, C)."""
    if not _inflated(norm):
        return norm_silu(dense(x, as_eager), norm, scale=scale, shift=shift)
    if scale is not None:
        scale, shift = (for_batch(m, x).repeat_interleave(x.shape[2], dim=0) for m in (scale, shift))
    return as_video(norm_silu(as_frames(x), norm, scale=scale, shift=shift), x.shape[2])


def _check_resnet(block: nn.Module) -> str | None:
    if not takes(block, "input_tensor", "temb"):
        return UNRELATED
    if not silu(block.nonlinearity):
        return f"its nonlinearity is {type(block.nonlinearity).__name__}, not SiLU"
    for norm in (block.norm1, block.norm2):
        if not _known(norm):
            return f"its norm is {type(norm).__name__}"
    if block.time_embedding_norm not in ("default", "scale_shift"):
        return f"time_embedding_norm {block.time_embedding_norm!r}"
    return None


def _resnet(block: nn.Module, eager: Any, input_tensor: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
    x, act = input_tensor, block.nonlinearity
    understood = x.dim() == 5 and silu(act) and (temb is None or block.time_emb_proj is not None)
    if not (understood and _known(block.norm1) and _known(block.norm2) and _runs(x, block.norm1)):
        return eager(block, input_tensor, temb)
    h = block.conv1(_normed(x, block.norm1, as_eager=dropping(block)))
    scale = shift = None
    if temb is not None:
        temb = block.time_emb_proj(act(temb))
        if block.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
        else:
            h = onto(h, temb[:, :, None, None, None], unwatched(block.conv1))
    h = block.conv2(block.dropout(_normed(h, block.norm2, scale, shift, dropping(block))))
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x)
    y = onto(h, x, unwatched(block.conv2))
    return y if block.output_scale_factor == 1 else y / block.output_scale_factor


def _check_attention(attn: Any) -> str | None:
    if type(attn).__name__ != "VersatileAttention" or attn.attention_mode != "Temporal":
        return f"its attention is {type(attn).__name__}"
    if attn.is_cross_attention:
        return "it attends to a text"
    if type(getattr(attn, "processor", None)).__name__ not in ("NoneType", "CrossAttnProcessor", "AttnProcessor"):
        return f"its processor is {type(attn.processor).__name__}"
    for name in ("group_norm", "added_kv_proj_dim"):
        if getattr(attn, name, None) is not None:
            return f"its attention has {name}"
    if attn.upcast_attention or attn.upcast_softmax:
        return "it casts its scores in a way of its own"
    if attn.pos_encoder is not None and type(attn.pos_encoder).__name__ != "PositionalEncoding":
        return f"its positions are {type(attn.pos_encoder).__name__}"
    return None


def _check_transformer(model: nn.Module) -> str | None:
    if not takes(model, "hidden_states", "encoder_hidden_states", "attention_mask"):
        return "its forward takes other arguments than those that are known"
    if not isinstance(model.norm, nn.GroupNorm):
        return f"norm is {type(model.norm).__name__}, not GroupNorm"
    for block in model.transformer_blocks:
        if type(block).__name__ != "TemporalTransformerBlock":
            return f"its blocks are {type(block).__name__}"
        if getattr(block, "local_window", False):
            return "it attends within windows of frames"
        for attn in block.attention_blocks:
            reason = _check_attention(attn)
            if reason is not None:
                return reason
    return None


def _ready(block: nn.Module, frames: int) -> bool:
    """Whether this call of a block may be taken apart."""
    if type(block).__name__ != "TemporalTransformerBlock" or not untouched(block) or dropping(block):
        return False
    if getattr(block, "local_window", False):
        return False
    for attn in block.attention_blocks:
        if _check_attention(attn) is not None or not untouched(attn) or not drops_nothing(attn.to_out[1]):
            return False
        if attn.pos_encoder is not None and not (
            untouched(attn.pos_encoder) and frames <= attn.pos_encoder.pe.shape[1]
        ):
            return False
    return True


def _run_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A TemporalTransformerBlock on tokens (B, T, S, C)."""
    for attn, norm in zip(block.attention_blocks, block.norms, strict=True):
        embedding = None if attn.pos_encoder is None else attn.pos_encoder.pe[0, : x.shape[1]]
        x = over_frames(attn, norm, x, embedding)
    return onto(block.ff(block.ff_norm(x)), x, unwatched(block.ff))


def _transformer(
    model: nn.Module, eager: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None,
    attention_mask: Any = None,
) -> torch.Tensor:  # fmt: skip
    """x + proj_out(blocks(proj_in(norm(x)))), the norm over each frame, attention over frames."""
    x, norm, blocks = hidden_states, model.norm, list(model.transformer_blocks)
    if x.dim() != 5 or not plain(norm, nn.GroupNorm) or not all(_ready(block, x.shape[2]) for block in blocks):
        return eager(model, hidden_states, encoder_hidden_states, attention_mask)
    batch, _, frames, height, width = x.shape
    sizes = (batch, frames, height * width)
    understood = all(runs_over_frames(attn, x, sizes) for block in blocks for attn in block.attention_blocks)
    if not understood or not kernel_runs("group_norm_silu", x[:, :, 0], norm.weight, norm.bias):
        return eager(model, hidden_states, encoder_hidden_states, attention_mask)
    rows = x.permute(0, 2, 3, 4, 1).contiguous()  # a view where the frames are in channels_last
    normed = norm_silu(rows.flatten(0, 1).permute(0, 3, 1, 2), norm, silu=False)
    y = model.proj_in(normed.permute(0, 2, 3, 1).reshape(*sizes, -1))
    for block in blocks:
        y = _run_block(block, y)
    # In the input's memory format: the way back from tokens is this sum.
    return x + model.proj_out(y).view(rows.shape).permute(0, 4, 1, 2, 3)


register(
    Target(("ResnetBlock3D",), "GroupNorm, over a clip or each frame, modulation and SiLU in one pass, twice",
           _check_resnet, _resnet),
    Target(("TemporalTransformer3DModel",), "GroupNorm, and norm + positions + projections + attention over frames,"
           " without permuted copies", _check_transformer, _transformer, temporal=True),
)  # fmt: skip
