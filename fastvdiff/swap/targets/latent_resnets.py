"""The ResBlock of the latent diffusion family (ModelScope, VideoCrafter, Stability's sgm): frames, or a whole video."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvdiff.swap.chains import convolved, normalised
from fastvdiff.swap.frames import as_frames, as_video, convolve, dense, onto, over_space
from fastvdiff.swap.target import (
    UNRELATED,
    Target,
    dropping,
    drops_nothing,
    group_norm,
    plain,
    register,
    silu,
    takes,
    untouched,
)

from .sequences import fuses, norm_silu

_METHOD = "_forward"  # `forward` is this one, checkpointed or not
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def _check_stack(stack: Any, layers: int) -> str | None:
    """Why a Sequential is not GroupNorm, SiLU, [Dropout,] convolution, or None if it is."""
    parts = list(stack) if isinstance(stack, nn.Sequential) else []
    if len(parts) != layers or not isinstance(parts[-1], _CONVOLUTIONS):
        return f"its layers are {[type(part).__name__ for part in parts]}"
    if not group_norm(parts[0]):
        return f"its norm is {type(parts[0]).__name__}"
    if not silu(parts[1]):
        return f"its activation is {type(parts[1]).__name__}, not SiLU"
    return None


def _check(block: nn.Module) -> str | None:
    known = (("x", "emb"), ("x", "emb", "batch_size"))
    if not any(takes(block, *names, method=_METHOD) for names in known) or not hasattr(block, "in_layers"):
        return UNRELATED
    for name in ("emb_layers", "skip_connection", "updown", "use_scale_shift_norm"):
        if not hasattr(block, name):
            return f"a ResBlock without {name}"
    return _check_stack(block.in_layers, 3) or _check_stack(block.out_layers, 4)


def _readable(stack: nn.Module) -> bool:
    return untouched(stack) and group_norm(stack[0]) and silu(stack[1])


def _embedded(block: nn.Module, emb: torch.Tensor, frames: int) -> torch.Tensor | None:
    """What the embedding gives each channel: (N, C) for frames (frames is 0), (B, C, T) for a video, or None."""
    if getattr(block, "skip_t_emb", False):
        return None
    projected = block.emb_layers(emb)
    if not frames:
        return projected
    if getattr(block, "exchange_temb_dims", False):
        return projected.transpose(1, 2)
    return projected.unsqueeze(-1).expand(-1, -1, frames)


def _forward(
    block: nn.Module, eager: Any, x: torch.Tensor, emb: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    first, last = block.in_layers, block.out_layers
    understood = x.dim() in (4, 5) and _readable(first) and _readable(last) and fuses(x, first[0])
    if not understood:
        return eager(block, x, emb, *args, **kwargs)
    video = x.dim() == 5
    h = norm_silu(dense(x, as_eager=dropping(block)) if video else x, first[0])
    if block.updown:
        h, x = block.h_upd(h), block.x_upd(x)
    modulation = _embedded(block, emb, h.shape[2] if video else 0)
    added = None if block.use_scale_shift_norm or modulation is None else modulation.type(h.dtype)
    scale, shift = modulation.chunk(2, dim=1) if block.use_scale_shift_norm else (None, None)
    stats = None
    if dropping(block):
        # The convolution itself, whose result's memory format decides where Dropout puts its random numbers.
        h = first[2](h)
        h = h if added is None else onto(h, over_space(added, h), plain(first[2], nn.Conv2d))
    else:
        h, stats = convolved(first[2], h, last[0], added)
    shortcut = block.skip_connection(x)
    idle = drops_nothing(last[2])
    fused = normalised(last[0], last[3], h, stats, scale, shift, shortcut) if idle else None
    if fused is not None:
        y = fused[0]
    else:
        h = last[2](norm_silu(h, last[0], scale=scale, shift=shift, stats=stats))
        # A video's sum is in the input's layout, which is the way back to frames.
        y = shortcut + convolve(last[3], h) if video else convolved(last[3], h, None, residual=shortcut)[0]
    batch = kwargs.get("batch_size", args[0] if args else None)
    if getattr(block, "use_temporal_conv", False) and batch:
        y = as_frames(block.temopral_conv(as_video(y, y.shape[0] // batch)))
    return y


register(
    Target(("ResBlock",), "GroupNorm, modulation and SiLU in one pass, twice", _check, _forward, covers=2,
           method=_METHOD),
)  # fmt: skip
