"""imagen-pytorch's video Unet3D: causal attention over frames, with its null key, and causal temporal convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastvdiff import ops
from fastvdiff.swap.frames import as_frames, as_video
from fastvdiff.swap.target import UNRELATED, Target, in_own_dtype, kernel_would_run, plain, register, takes, untouched

_ATTENTION = ("norm", "null_attn_bias", "null_kv", "to_q", "to_kv", "q_scale", "k_scale", "to_out", "rel_pos_bias")

_FEW = 2**18


def _check_time_centric(module: nn.Module) -> str | None:
    residual = getattr(module, "fn", None)
    if not takes(module, "x") or type(residual).__name__ != "Residual":
        return UNRELATED
    attn = residual.fn
    if type(attn).__name__ != "Attention" or not takes(attn, "x", "context", "mask", "attn_bias"):
        return f"what it does over frames is {type(attn).__name__}"
    for name in _ATTENTION:
        if not hasattr(attn, name):
            return f"an Attention without {name}"
    if attn.null_kv.shape != (2, attn.q_scale.shape[0]):
        return "it has more than one key head"
    return None


def _ready(module: nn.Module) -> bool:
    """Whether, at this call, the attention may be computed without calling it."""
    residual = module.fn
    attn = residual.fn
    named = type(residual).__name__ == "Residual" and type(attn).__name__ == "Attention"
    return named and untouched(residual) and untouched(attn)


def _normed(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """norm(x) over the last dimension of x: imagen-pytorch's LayerNorm in torch's one pass, any other by calling it."""
    known = type(norm).__name__ == "LayerNorm" and untouched(norm) and not getattr(norm, "stable", True)
    if not known or norm.g.dtype != x.dtype:
        return norm(x)
    # As the library: in float64 too, so that float32's error against float64 is that of another eps, swapped or not.
    eps = 1e-5 if x.dtype == torch.float32 else 1e-3
    if x.device.type == "cpu" and x.dtype != torch.float32:
        # torch sums a LayerNorm's weight gradient in 16 bits on a CPU, the library's product in 32.
        return F.layer_norm(x, x.shape[-1:], None, None, eps) * norm.g
    return F.layer_norm(x, x.shape[-1:], norm.g, None, eps)


def _with_null(null: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The frames of x (B, T, S, D), after one of `null` (D,), for the one head that all queries share."""
    null = null.to(x.dtype).expand(x.shape[0], 1, x.shape[2], -1)
    return torch.cat((null, x), dim=1)


def _time_centric(module: nn.Module, eager: Any, x: torch.Tensor) -> torch.Tensor:
    """x + attention over frames, of every position's frames and one learned key, all query heads sharing one of them.

    The scores are cosines times q_scale, k_scale and a constant, plus a bias from the distance in frames.
    """
    if x.dim() != 5 or not _ready(module):
        return eager(module, x)
    attn = module.fn.fn
    batch, _, frames, height, width = x.shape
    sizes = (batch, frames, height * width, attn.heads, attn.q_scale.shape[0])
    if not kernel_would_run("temporal_attention", x, sizes, torch.is_grad_enabled(), keys=frames + 1):
        return eager(module, x)
    tokens = x.permute(0, 2, 3, 4, 1).flatten(2, 3)
    h = _normed(attn.norm, tokens)
    k, v = attn.to_kv(h).chunk(2, dim=-1)
    k, v = _with_null(attn.null_kv[0], k), _with_null(attn.null_kv[1], v)
    q = F.normalize(attn.to_q(h).unflatten(-1, (attn.heads, -1)), dim=-1) * attn.q_scale
    k = F.normalize(k, dim=-1) * attn.k_scale
    bias = mask = None
    if attn.rel_pos_bias is not None:
        bias = attn.rel_pos_bias(frames, device=x.device, dtype=q.dtype)
        bias = torch.cat((attn.null_attn_bias[:, None, None].expand(-1, frames, 1).to(bias.dtype), bias), dim=-1)
    if attn.causal:
        mask = torch.ones(frames, frames + 1, dtype=torch.bool, device=x.device).tril(1).expand(batch, -1, -1)
    k, v = (t.unsqueeze(3).expand(-1, -1, -1, attn.heads, -1) for t in (k.to(q.dtype), v.to(q.dtype)))
    y = ops.temporal_attention(q, k, v, attn_bias=bias, attn_mask=mask, scale=attn.scale).flatten(-2)
    y = _normed(attn.to_out[1], attn.to_out[0](y)) if _linear_and_norm(attn.to_out) else attn.to_out(y)
    return (y + tokens).unflatten(2, (height, width)).permute(0, 4, 1, 2, 3)


def _linear_and_norm(to_out: nn.Module) -> bool:
    return isinstance(to_out, nn.Sequential) and untouched(to_out) and len(to_out) == 2


def _check_convolution(conv: nn.Module) -> str | None:
    if isinstance(conv, nn.Conv3d) or not takes(conv, "x", "ignore_time"):
        return UNRELATED
    if not isinstance(conv.spatial_conv, nn.Conv2d) or not isinstance(conv.temporal_conv, nn.Conv1d):
        return UNRELATED  # 1x1: nothing over frames
    return None


def _convolution(conv: nn.Module, eager: Any, x: torch.Tensor, ignore_time: bool = False) -> torch.Tensor:
    """A convolution over each frame, then one over each position's frames, causal."""
    temporal = conv.temporal_conv
    if x.dim() != 5 or ignore_time or not (plain(temporal, nn.Conv1d) and temporal.padding_mode == "zeros"):
        return eager(conv, x, ignore_time)
    video = as_video(conv.spatial_conv(as_frames(x)), x.shape[2])
    front = conv.kernel_size - 1 + temporal.padding[0]
    padding = (front, temporal.padding[0], 0, 0, 0, 0)
    return ops.conv3d(video, temporal.weight[..., None, None], temporal.bias, (*temporal.stride, 1, 1), padding,
                      (*temporal.dilation, 1, 1), temporal.groups)  # fmt: skip


def _check_positions(residual: nn.Module) -> str | None:
    parts = getattr(residual, "fn", None)
    if not (isinstance(parts, nn.Sequential) and len(parts) == 2 and type(parts[0]).__name__ == "Pad"):
        return UNRELATED
    if not takes(residual, "x", "kwargs") or not isinstance(parts[1], nn.Conv3d):
        return UNRELATED
    pads = tuple(parts[0].padding)
    in_time = parts[0].value == 0 and len(pads) == 6 and not any(pads[:4])
    return None if in_time else "it pads in space, or not with zeros"


def _positions(residual: nn.Module, eager: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """x + a convolution over the frames of each channel, padded in front.

    On a CPU the convolution's view pays from a quarter of a million values, or two samples, upward.
    """
    pad, conv = residual.fn
    known = plain(conv, nn.Conv3d) and conv.padding_mode == "zeros" and not any(conv.padding)
    small = x.device.type == "cpu" and x.shape[0] == 1 and x.numel() <= _FEW
    if kwargs or small or x.dim() != 5 or not (known and untouched(residual.fn) and untouched(pad)):
        return eager(residual, x, **kwargs)
    padding = (*pad.padding[4:], 0, 0, 0, 0)
    fused = in_own_dtype(x)
    y = ops.conv3d(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups,
                   residual=x if fused else None)  # fmt: skip
    return y if fused else y + x


def _check_block(block: nn.Module) -> str | None:
    if not takes(block, "x", "scale_shift", "ignore_time"):
        return UNRELATED
    return f"its norm is {type(block.norm).__name__}, over channels: no kernel has it with modulation and SiLU"


def _leave(block: nn.Module, eager: Any, *args: Any, **kwargs: Any) -> Any:
    """Never put behind a module: `_check_block` has something against each."""
    return eager(block, *args, **kwargs)


register(
    Target(("RearrangeTimeCentric",), "causal attention over frames without permuted copies", _check_time_centric,
           _time_centric, temporal=True),
    Target(("Conv3d",), "the temporal part causal inside the convolution, without permuted copies", _check_convolution,
           _convolution),
    Target(("Residual",), "padding and sum inside the temporal convolution", _check_positions, _positions,
           covers=2),
    Target(("Block",), "nothing", _check_block, _leave),
)  # fmt: skip
