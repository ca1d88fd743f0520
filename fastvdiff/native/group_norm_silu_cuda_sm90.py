"""group_norm_silu's forward on clusters (csrc/cuda/group_norm_silu_resident.cu) beside the other kernels' backward."""

from __future__ import annotations

import functools

import torch

from . import address, library, on_device, stream
from .group_norm_silu_cuda import backward, call_of, parameter, readable, view
from .group_norm_silu_cuda import forward as forward_in_passes
from .rows import is_channels_last

__all__ = ["backward", "cut", "forward"]

SHARED_MEMORY = 227 * 1024  # of one block, on capability 9.0 and 10.0
THREADS = 512
GROUP_BYTES = 4 * (3 * THREADS // 32 + 4 + 2)  # of shared memory beside the rows, as `Column::shared` counts them
CHANNEL_BYTES = 4 * 3
RANKS = (1, 2, 4, 8)  # blocks of a cluster: 8 are portable
MOST_GROUPS = 8
_START_BYTES = 48 * 1024  # what a round of blocks costs besides, as bytes it could have moved


@functools.lru_cache(maxsize=1024)
def cut(
    batch: int, channels: int, positions: int, groups: int, itemsize: int, multiprocessors: int
) -> tuple[int, int] | None:
    """Groups of a column and blocks of its cluster, for the least time; None where no column fits.

    A column is whole groups and whole 16-byte accesses, 64 bytes wide where it can be: narrower ones read half of a
    memory transaction.
    """
    width = channels // groups * itemsize
    best, least = None, 0.0
    for together in range(1, min(groups, MOST_GROUPS) + 1):
        column = together * width
        if groups % together or column % 16 or column // 16 > THREADS:
            continue
        beside = together * GROUP_BYTES + column // itemsize * CHANNEL_BYTES
        for ranks in RANKS:
            shared = -(-positions // ranks) * column + beside
            if shared > SHARED_MEMORY or ranks > positions:
                continue
            # One block is resident: its threads have more than 64 registers.
            rounds = -(-batch * groups // together * ranks // multiprocessors)
            cost = rounds * (shared + _START_BYTES) * (1.0 if column >= 64 else 1.5)
            if best is None or cost < least:
                best, least = (together, ranks), cost
    return best


def forward(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
    scale: torch.Tensor | None, shift: torch.Tensor | None, silu: bool, stats: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `group_norm_silu_cuda.forward`, which also runs what the clusters do not take (an address off 16 bytes)."""
    y = torch.empty_like(x)
    given = [readable(p) for p in (weight, bias, scale, shift)]
    chosen = None
    if x.numel() and stats is None and is_channels_last(y):
        call = call_of(x, num_groups, given, True, silu)
        (batch, channels, positions, _, _), _, _, multiprocessors = call
        chosen = cut(batch, channels, positions, num_groups, x.element_size(), multiprocessors)
    if chosen is None:
        return forward_in_passes(x, num_groups, weight, bias, eps, scale, shift, silu, stats)
    rows, (x_view, y_view) = zip(*(view(t, True) for t in (x, y)), strict=True)
    moments = torch.empty((batch, num_groups, 2), dtype=torch.float32, device=x.device)
    with on_device(x):
        done = library().cuda_group_norm_silu_resident_forward(
            *call, stream(x), x_view, [parameter(p) for p in given], address(moments), y_view, eps, *chosen
        )
    if not done:
        return forward_in_passes(x, num_groups, weight, bias, eps, scale, shift, silu, stats)
    return (y if rows[1] is y else y.copy_(rows[1])), moments
