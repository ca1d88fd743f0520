"""The blocks of video-diffusion-pytorch's Unet3D: convolution, norm, modulation and SiLU; attention over frames."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastvdiff import ops
from fastvdiff.swap.frames import convolve, onto
from fastvdiff.swap.target import (
    UNRELATED,
    Target,
    in_own_dtype,
    kernel_runs,
    kernel_would_run,
    plain,
    register,
    silu,
    takes,
    untouched,
    unwatched,
)

from .sequences import norm_silu

_FROM, _OVER_FRAMES = "b c f h w", "b (h w) f c"


def _check_block(block: nn.Module) -> str | None:
    known = takes(block, "x", "scale_shift") and set(dict(block.named_children())) == {"proj", "norm", "act"}
    if not known or not isinstance(block.proj, nn.Conv3d):
        return UNRELATED
    if not isinstance(block.norm, nn.GroupNorm):
        return f"its norm is {type(block.norm).__name__}, over channels: no kernel has it with modulation and SiLU"
    if not silu(block.act):
        return f"its activation is {type(block.act).__name__}, not SiLU"
    return None


def _per_channel(modulation: Any) -> bool:
    return isinstance(modulation, torch.Tensor) and modulation.dim() == 5 and modulation[0, 0].numel() == 1


def _block(block: nn.Module, eager: Any, x: torch.Tensor, scale_shift: Any = None) -> torch.Tensor:
    """SiLU(norm(proj(x)) * (1 + scale) + shift), scale and shift (B, C, 1, 1, 1)."""
    understood = x.dim() == 5 and plain(block.norm, nn.GroupNorm) and silu(block.act)
    if scale_shift is not None:
        understood = understood and len(scale_shift) == 2 and all(map(_per_channel, scale_shift))
    sizes = (x.shape[0], block.norm.num_channels, *x.shape[2:])
    if not (understood and kernel_would_run("group_norm_silu", x, sizes, torch.is_grad_enabled())):
        return eager(block, x, scale_shift)
    scale, shift = (None, None) if scale_shift is None else (m.flatten(1) for m in scale_shift)
    return norm_silu(convolve(block.proj, x), block.norm, scale=scale, shift=shift)


def _check_resnet(block: nn.Module) -> str | None:
    known = takes(block, "x", "time_emb") and {"block1", "block2", "res_conv"} <= set(dict(block.named_children()))
    if not known or not all(takes(part, "x", "scale_shift") for part in (block.block1, block.block2)):
        return UNRELATED  # before its release 0.4.1 the embedding was added
    return None if isinstance(block.res_conv, (nn.Conv3d, nn.Identity)) else UNRELATED


def _resnet(block: nn.Module, eager: Any, x: torch.Tensor, time_emb: torch.Tensor | None = None) -> torch.Tensor:
    mlp = block.mlp
    if x.dim() != 5 or (mlp is None) != (time_emb is None):
        return eager(block, x, time_emb)
    scale_shift = None if mlp is None else mlp(time_emb)[..., None, None, None].chunk(2, dim=1)
    h = block.block2(block.block1(x, scale_shift=scale_shift))
    if plain(block.res_conv, nn.Conv3d):
        return convolve(block.res_conv, x, residual=h)
    return onto(h, block.res_conv(x), unwatched(block.block2))


def _check_rotary(rotary: Any) -> str | None:
    """Why rotary_emb does not turn pairs (2i, 2i + 1) by frame times freqs[i], or None if it does."""
    if type(rotary).__name__ != "RotaryEmbedding" or rotary.freqs.dim() != 1:
        return f"its positions are {type(rotary).__name__}"
    if rotary.freqs.requires_grad:
        return "its rotary frequencies are learned"
    if getattr(rotary, "use_xpos", False) or getattr(rotary, "seq_before_head_dim", False):
        return "its rotary positions scale what they turn, or expect the heads elsewhere"
    return None


def _check_attention(residual: nn.Module) -> str | None:
    pre = getattr(residual, "fn", None)
    if type(pre).__name__ != "PreNorm" or not takes(residual, "x", "args", "kwargs"):
        return UNRELATED
    if type(pre.fn).__name__ == "SpatialLinearAttention":
        return "linear attention within a frame: no kernel for it"
    if type(pre.fn).__name__ != "EinopsToAndFrom" or type(pre.fn.fn).__name__ != "Attention":
        return f"attention by {type(pre.fn).__name__} is not known"
    if pre.fn.from_einops != _FROM or pre.fn.to_einops != _OVER_FRAMES:
        return f"attention over {pre.fn.to_einops!r}, not over frames"
    if type(pre.norm).__name__ != "LayerNorm" or pre.norm.gamma.shape[0] != 1 or pre.norm.gamma.dim() != 5:
        return f"its norm is {type(pre.norm).__name__}, not the LayerNorm over channels that is known"
    attn = pre.fn.fn
    if not takes(attn, "x", "pos_bias", "focus_present_mask"):
        return "its attention takes other arguments than those that are known"
    return None if attn.rotary_emb is None else _check_rotary(attn.rotary_emb)


def _readable(residual: nn.Module) -> bool:
    """Whether, at this call, everything down to the projections may be computed without calling it."""
    pre = residual.fn
    parts = (pre, pre.norm, pre.fn, pre.fn.fn)
    # Named again: something may have been put around one of them since.
    names = ("PreNorm", "LayerNorm", "EinopsToAndFrom", "Attention")
    return all(type(m).__name__ == name and untouched(m) for m, name in zip(parts, names, strict=True))


def rotary_table(rotary: nn.Module | None, frames: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(cos, sin), each (frames, R/2), of a RotaryEmbedding; float32, or float64 for a float64 x."""
    if rotary is None:
        return None
    freqs = rotary.freqs.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    positions = torch.arange(frames, device=freqs.device, dtype=freqs.dtype) / getattr(rotary, "interpolate_factor", 1)
    angles = positions[:, None] * freqs
    return angles.cos(), angles.sin()


def _focus(mask: torch.Tensor | None, frames: int) -> torch.Tensor | None:
    """(B, T, T) bool of a (B,) mask: a sample that is marked attends, in each frame, to that frame only."""
    if mask is None:
        return None
    # Without a look at its values, for which a device would have to be waited for.
    return ~mask[:, None, None] | torch.eye(frames, dtype=torch.bool, device=mask.device)


def _fits(x: torch.Tensor, heads: int, bias: Any, mask: Any) -> bool:
    """Whether bias is (heads, T, T) or None, and mask (B,) bool or None."""
    frames = x.shape[2]
    if bias is not None and tuple(bias.shape) != (heads, frames, frames):
        return False
    return mask is None or (mask.dtype == torch.bool and tuple(mask.shape) == (x.shape[0],))


def _attention(residual: nn.Module, eager: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """x + to_out(attention over frames of to_qkv(norm(x)))."""
    bias, mask = kwargs.get("pos_bias"), kwargs.get("focus_present_mask")
    if args or set(kwargs) - {"pos_bias", "focus_present_mask"} or x.dim() != 5 or not _readable(residual):
        return eager(residual, x, *args, **kwargs)
    norm, attn = residual.fn.norm, residual.fn.fn.fn
    batch, _, frames, height, width = x.shape
    inner = attn.to_out.in_features
    sizes = (batch, frames, height * width, attn.heads, inner // attn.heads)
    in_linear = plain(attn.to_qkv, nn.Linear) and plain(attn.to_out, nn.Linear) and attn.to_qkv.bias is None
    if not _fits(x, attn.heads, bias, mask) or not (
        kernel_would_run("temporal_attention", x, sizes, torch.is_grad_enabled(), keys=frames)
    ):
        return eager(residual, x, **kwargs)
    options = {"attn_bias": bias, "attn_mask": _focus(mask, frames), "scale": attn.scale,
               "rotary": rotary_table(attn.rotary_emb, frames, x)}  # fmt: skip
    if in_linear and in_own_dtype(x):
        weights = (*attn.to_qkv.weight.chunk(3), attn.to_out.weight)
        if kernel_runs("temporal_attention_block", x, *weights, norm.gamma, bias, heads=attn.heads, inner=inner):
            return ops.temporal_attention_block(x, *weights, heads=attn.heads, out_bias=attn.to_out.bias,
                                                norm_weight=norm.gamma.flatten(), eps=norm.eps, **options)  # fmt: skip
    tokens = x.permute(0, 2, 3, 4, 1).flatten(2, 3)
    h = F.layer_norm(tokens, tokens.shape[-1:], norm.gamma.flatten(), None, norm.eps)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in attn.to_qkv(h).chunk(3, dim=-1))
    y = attn.to_out(ops.temporal_attention(q, k, v, **options).flatten(-2))
    return x + y.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3)


register(
    Target(("Block",), "GroupNorm, modulation and SiLU in one pass; the convolution through its cheapest view",
           _check_block, _block),
    Target(("ResnetBlock",), "the sum in the convolution of the shortcut, or in place", _check_resnet, _resnet),
    Target(("Residual",), "norm + projections + rotary attention over frames + residual, without permuted copies",
           _check_attention, _attention, temporal=True),
)  # fmt: skip
