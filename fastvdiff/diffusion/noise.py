"""Noise for video: independent, or correlated across frames with unit variance everywhere.

Frames of one clip share content, so a model may be trained and sampled with noise that they share too (PYoCo, Ge et al.
2023, arXiv:2305.10474). Every frame on its own stays standard normal; the correlation of frames i and j is

- "mixed":       alpha^2 / (1 + alpha^2) for any two frames (one shared draw in all of them);
- "progressive": rho^|i - j| with rho = alpha / sqrt(1 + alpha^2) (each frame follows from the one before).

A sampler that adds noise on the way (eta > 0) draws it from the same prior: pass it as `variance_noise`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

NOISE_KINDS = ("iid", "mixed", "progressive")
_PAPER_ALPHA = {"mixed": 1.0, "progressive": 2.0}
FRAME_DIM = 2

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """torch.randn of this shape, from one generator or one per sample (so that a sample keeps its noise in any batch).

    A generator on the CPU draws there and the result moves to `device`: the same noise on every device.
    Raises ValueError if the number of generators is not shape[0], or a generator's device cannot serve `device`.
    """
    shape = tuple(shape)
    device = torch.device("cpu" if device is None else device)
    if generator is None:
        return torch.randn(shape, device=device, dtype=dtype)
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    origin = generators[0].device if generators else device
    if origin.type not in ("cpu", device.type):
        raise ValueError(f"draw_noise: generator: expected one on cpu or {device}, got one on {origin}")
    if len(generators) == 1:
        return torch.randn(shape, generator=generators[0], device=origin, dtype=dtype).to(device)
    if len(generators) != shape[0]:
        raise ValueError(f"draw_noise: generator: expected 1 or {shape[0]} generators, got {len(generators)}")
    rows = [torch.randn((1, *shape[1:]), generator=g, device=g.device, dtype=dtype) for g in generators]
    return torch.cat(rows).to(device)


def video_noise(
    shape: Sequence[int],
    kind: str = "iid",
    alpha: float | None = None,
    *,
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normal noise (B, C, T, H, W), correlated across frames as `kind` says.

    kind: "iid", "mixed" or "progressive" (see the module). alpha: how much the frames share, from 0 (nothing) upward;
    None is the paper's 1 for mixed and 2 for progressive. Raises ValueError for another kind or a negative alpha.
    """
    return correlate_frames(draw_noise(_with_shared(shape, kind), generator, device, dtype), kind, alpha)


def _with_shared(shape: Sequence[int], kind: str) -> tuple[int, ...]:
    """The shape of the independent draws: one frame more when there is a shared one."""
    sizes = list(shape)
    if len(sizes) != 5:
        raise ValueError(f"video_noise: shape: expected (B, C, T, H, W), got {tuple(shape)}")
    sizes[FRAME_DIM] += kind == "mixed"
    return tuple(sizes)


def correlate_frames(draws: torch.Tensor, kind: str, alpha: float | None = None) -> torch.Tensor:
    """Independent standard normal frames made into correlated ones, each still standard normal.

    draws: (B, C, T, H, W); for "mixed" (B, C, T + 1, H, W), the last frame being the shared one. Returns T frames.
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"video_noise: kind: expected one of {', '.join(map(repr, NOISE_KINDS))}, got {kind!r}")
    if kind == "iid":
        return draws
    alpha = _PAPER_ALPHA[kind] if alpha is None else alpha
    if alpha < 0:
        raise ValueError(f"video_noise: alpha: expected a number from 0 upward, got {alpha!r}")
    shared, own = alpha / math.sqrt(1 + alpha**2), 1 / math.sqrt(1 + alpha**2)
    if kind == "mixed":
        return shared * draws[:, :, -1:] + own * draws[:, :, :-1]
    frames = list(draws.unbind(FRAME_DIM))
    for i in range(1, len(frames)):
        frames[i] = shared * frames[i - 1] + own * frames[i]
    return torch.stack(frames, FRAME_DIM)
