"""norm_silu_conv3d's CUDA kernels: conv3d's, with the norm applied to the input on its way in."""

from __future__ import annotations

import torch

from . import address, conv3d_cuda, library, on_device, stream, wide

_Optional = torch.Tensor | None


def forward(
    x: torch.Tensor, num_groups: int, norm_weight: _Optional, norm_bias: _Optional, eps: float, scale: _Optional,
    shift: _Optional, silu: bool, stats: torch.Tensor, weight: torch.Tensor, bias: _Optional,
    geometry: conv3d_cuda.Geometry, prefix: _Optional, channel_bias: _Optional, residual: _Optional, stats_groups: int,
    out_size: tuple[int, ...], channels_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The result and its statistics, as conv3d's kernels give them; `stats` are those of x."""
    table = _table(x, num_groups, norm_weight, norm_bias, eps, stats, scale, shift)
    return conv3d_cuda.forward(
        x, weight, bias, geometry, prefix, channel_bias, residual, stats_groups, out_size, channels_last,
        conv3d_cuda.Prologue(table, silu),
    )  # fmt: skip


def _table(
    x: torch.Tensor, num_groups: int, norm_weight: _Optional, norm_bias: _Optional, eps: float, stats: torch.Tensor,
    scale: _Optional, shift: _Optional,
) -> torch.Tensor:  # fmt: skip
    """(B, T or 1, C, 2): the factor and the term that normalise and modulate each channel."""
    batch, channels, time, height, width = x.shape
    frames = [1 if p is None or p.dim() == 2 else p.shape[2] for p in (scale, shift)]
    table = torch.empty((batch, max(frames), channels, 2), dtype=torch.float32, device=x.device)
    given = [wide(p) for p in (stats, norm_weight, norm_bias, scale, shift)]
    values = channels // num_groups * time * height * width
    with on_device(x):
        library().cuda_conv3d_prologue(
            [*map(address, given), address(table)], (batch, channels, num_groups, max(frames), *frames, values), eps,
            stream(x),
        )  # fmt: skip
    return table
