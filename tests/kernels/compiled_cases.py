"""Calls whose launches are compiled ahead of time: the standard shapes, and every feature once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastvdiff.kernels import ddim_step, geglu, group_norm_silu, temporal_attention, temporal_attention_block
from fastvdiff.ops.ddim_step import Step

Case = tuple[str, Callable[[], Any]]
# Batch, frames, height, width, channels, heads, head dimension.
LEVELS = {
    "svd-l0": (2, 25, 72, 128, 320, 5, 64),
    "svd-l3": (2, 25, 9, 16, 1280, 20, 64),
    "animatediff-l0": (2, 16, 64, 64, 320, 8, 40),
    "animatediff-l1": (2, 16, 32, 32, 640, 8, 80),
    "animatediff-l2": (2, 16, 16, 16, 1280, 8, 160),
    "vdm-l0": (4, 16, 64, 64, 64, 8, 32),
    "vdm-l1": (4, 16, 32, 32, 128, 8, 32),
}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, channels_last: bool = False) -> torch.Tensor:
    """A tensor without memory."""
    format = torch.channels_last_3d if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=format)


# Shapes whose kernels differ from others only in a size: compiled in the long run.
LONG = (
    *(f"group_norm_silu-{level}-{format}" for level in ("svd-l3", "animatediff-l0", "vdm-l0")
      for format in ("channels_last", "contiguous")),
    "group_norm_silu-past-2^31-channels_last", "temporal_attention-svd-l3", "temporal_attention-vdm-l0",
    "temporal_attention-vdm-l1", "temporal_attention-animatediff-l1", "temporal_attention-vdm-l0-channels_first",
    "temporal_attention-animatediff-l1-channels_first", "temporal_attention-128-channels_first",
    "temporal_attention-64-frames", "temporal_attention-256-frames-160", "temporal_attention_block-vdm-l1",
    "temporal_attention_block-animatediff-l0", "temporal_attention_block-vdm-l0-fp32", "ddim_step-256MB",
)  # fmt: skip


def cases(long: bool) -> Iterator[Case]:
    """The cases by name: all of them, or those of the ordinary run."""
    for each in (_group_norm_silu, _temporal_attention, _temporal_attention_block, _geglu, _ddim_step):
        yield from (case for case in each() if long or case[0] not in LONG)


def _group_norm_silu() -> Iterator[Case]:
    def both(x: torch.Tensor, modulation: tuple[int, ...] | None = None, stats: bool = False, groups: int = 32) -> None:
        batch, channels = x.shape[:2]
        weight, bias = empty(channels), empty(channels)
        scale, shift = (None, None) if modulation is None else (empty(*modulation), empty(*modulation))
        given = empty(batch, groups, 2, dtype=torch.float32) if stats else None
        _, moments = group_norm_silu.forward(x, groups, weight, bias, 1e-5, scale, shift, True, given)
        group_norm_silu.backward(torch.empty_like(x), x, moments, groups, weight, bias, scale, shift, True)

    small = (2, 64, 4, 8, 8)  # two channels a group, and what Triton 3.6 once failed to lay out
    yield "group_norm_silu-small", lambda: both(empty(*small), small[:2])
    for level in ("svd-l0", "svd-l3", "animatediff-l0", "vdm-l0"):
        b, t, h, w, c, *_ = LEVELS[level]
        for last in (True, False):
            name = f"group_norm_silu-{level}-{'channels_last' if last else 'contiguous'}"
            yield name, lambda b=b, t=t, h=h, w=w, c=c, last=last: both(empty(b, c, t, h, w, channels_last=last))
    for last in (True, False):
        suffix = "channels_last" if last else "contiguous"
        yield f"group_norm_silu-vae-{suffix}", lambda last=last: both(empty(1, 128, 20, 256, 256, channels_last=last))
        yield f"group_norm_silu-mid-{suffix}", lambda last=last: both(empty(1, 512, 8, 45, 80, channels_last=last))
        yield (
            f"group_norm_silu-modulated-{suffix}",
            lambda last=last: both(empty(2, 320, 25, 36, 64, channels_last=last), (2, 320, 25)),
        )
        yield (
            f"group_norm_silu-fp32-stats-{suffix}",
            lambda last=last: both(empty(2, 64, 16, 32, 32, dtype=torch.float32, channels_last=last), (2, 64), True),
        )
        yield (
            f"group_norm_silu-past-2^31-{suffix}",
            lambda last=last: both(empty(1, 128, 24, 1008, 1792, channels_last=last)),
        )
    # Triton makes constants of arguments that are 1.
    yield "group_norm_silu-one-access-a-frame", lambda: both(empty(2, 64, 4, 2, 4), (2, 64, 4), True)
    yield (
        "group_norm_silu-one-position-a-frame",
        lambda: both(empty(2, 64, 4, 1, 1, channels_last=True), (2, 64, 4), True),
    )
    yield "group_norm_silu-per-frame", lambda: both(empty(50, 320, 72, 128))
    yield "group_norm_silu-odd-channels", lambda: both(empty(1, 40, 8, 45, 80, channels_last=True), groups=8)
    yield "group_norm_silu-whole", lambda: both(empty(32, 1280, 16, 16))
    yield "group_norm_silu-whole-fp32", lambda: both(empty(4, 512, 8, 8, 8, dtype=torch.float32))
    yield "group_norm_silu-one-channel-a-group", lambda: both(empty(2, 512, 16, 32, 32, channels_last=True), groups=512)
    yield "group_norm_silu-one-group", lambda: both(empty(2, 512, 16, 32, 32), groups=1)


def _temporal_attention() -> Iterator[Case]:
    def both(
        shape: tuple[int, ...], keys: int | None = None, bias: bool = False, mask: bool = False, pairs: int = 0,
        causal: bool = False, dtype: torch.dtype = torch.bfloat16, channels_first: bool = False,
    ) -> None:  # fmt: skip
        b, t, s, heads, d = shape
        keys = keys or t

        def draw(length: int) -> torch.Tensor:
            if channels_first:
                return empty(b, heads, d, length, s, dtype=dtype).permute(0, 3, 4, 1, 2)
            return empty(b, length, s, heads, d, dtype=dtype)

        q, k, v = draw(t), draw(keys), draw(keys)
        added = empty(heads, t, keys, dtype=torch.float32) if bias else None
        allowed = empty(b, t, keys, dtype=torch.bool) if mask else None
        cos, sin = (
            (empty(256, pairs, dtype=torch.float32), empty(256, pairs, dtype=torch.float32)) if pairs else (None, None)
        )
        options = (added, allowed, cos, sin, True, 0, d**-0.5, causal)
        y = temporal_attention.forward(q, k, v, *options)
        temporal_attention.backward(torch.empty_like(y), q, k, v, *options, bias)

    for level, (b, t, h, w, _, heads, d) in LEVELS.items():
        shape = (b, t, h * w, heads, d)
        yield f"temporal_attention-{level}", lambda shape=shape: both(shape)
    for level in ("svd-l0", "vdm-l0", "animatediff-l1", "animatediff-l2"):
        b, t, h, w, _, heads, d = LEVELS[level]
        shape = (b, t, h * w, heads, d)
        yield f"temporal_attention-{level}-channels_first", lambda shape=shape: both(shape, channels_first=True)
    vdm = (4, 16, 64 * 64, 8, 32)
    yield "temporal_attention-vdm-l0-bias-rotary-mask", lambda: both(vdm, bias=True, mask=True, pairs=16)
    yield "temporal_attention-fp32-causal", lambda: both((1, 16, 256, 4, 64), causal=True, dtype=torch.float32)
    yield "temporal_attention-128-channels_first", lambda: both((2, 16, 256, 8, 128), channels_first=True)
    yield "temporal_attention-64-frames", lambda: both((1, 64, 1024, 8, 64))
    yield "temporal_attention-128-frames", lambda: both((1, 128, 1024, 8, 64), bias=True, pairs=32)
    yield "temporal_attention-256-frames-160", lambda: both((1, 256, 256, 8, 160))
    yield "temporal_attention-prefix", lambda: both((1, 4, 1024, 8, 64), keys=20)
    yield "temporal_attention-past-2^31", lambda: both((8, 25, 320 * 576, 5, 64))


def _temporal_attention_block() -> Iterator[Case]:
    def both(level: str, norm: str = "layer_norm", full: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
        b, t, h, w, c, heads, d = LEVELS[level]
        inner, x = heads * d, empty(b, c, t, h, w, dtype=dtype, channels_last=True)
        weights = [empty(inner, c, dtype=dtype) for _ in range(3)]
        biases = [empty(inner, dtype=dtype) for _ in range(3)] if full else [None] * 3
        frames, scores = (empty(t, c, dtype=dtype), empty(heads, t, t, dtype=dtype)) if full else (None, None)
        norms = (empty(c, dtype=dtype), empty(c, dtype=dtype) if norm == "layer_norm" else None)
        parameters = [*weights, *biases, empty(c, inner, dtype=dtype), empty(c, dtype=dtype), *norms, frames, scores]
        cos = sin = empty(t, d // 2, dtype=torch.float32) if full else None
        mask = empty(b, t, dtype=torch.bool) if full else None
        options = (heads, norm, 1e-5, mask, cos, sin, "interleaved", 1 / math.sqrt(d), False, True)
        y = temporal_attention_block.forward(x, parameters, *options)
        wanted = [p is not None for p in parameters]
        temporal_attention_block.backward(torch.empty_like(y), x, parameters, wanted, *options)

    for level in ("vdm-l0", "vdm-l1", "svd-l0", "animatediff-l0"):
        yield f"temporal_attention_block-{level}", lambda level=level: both(level)
    yield "temporal_attention_block-vdm-l0-full", lambda: both("vdm-l0", "rms_norm", full=True)
    yield "temporal_attention_block-animatediff-l0-full", lambda: both("animatediff-l0", full=True)
    yield "temporal_attention_block-vdm-l0-fp32", lambda: both("vdm-l0", dtype=torch.float32)


def _geglu() -> Iterator[Case]:
    def both(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> None:
        x = empty(rows, 2 * width, dtype=dtype)
        geglu.backward(geglu.forward(x), x)

    yield "geglu-svd-l0", lambda: both(2 * 25 * 72 * 128, 1280)
    yield "geglu-fp32", lambda: both(4096, 2560, torch.float32)
    yield "geglu-masked", lambda: both(4096, 200, torch.float16)


def _ddim_step() -> Iterator[Case]:
    def both(
        *shape: int, dtype: torch.dtype = torch.bfloat16, channels_last: bool = False, seed: bool = False,
        clip: float | None = None, ratio: float = 0.0, rescale: float = 0.0, prediction: str = "epsilon",
        device_values: bool = False,
    ) -> None:  # fmt: skip
        x, out, uncond = (empty(*shape, dtype=dtype, channels_last=channels_last) for _ in range(3))
        alphas = [empty(shape[0], dtype=torch.float32) if device_values else None for _ in range(2)]
        guidance = empty(shape[0], shape[2], dtype=torch.float32) if device_values else None
        noise = empty(1, dtype=torch.int64) if seed else None
        step = Step(
            alphas[0], 0.5, alphas[1], 0.6, guidance, 7.5, rescale, prediction, 1.0 if seed else 0.0, clip, ratio,
            4.0 if ratio else 0.0, False,
        )  # fmt: skip
        ddim_step.forward(x, out, uncond, None, noise, step, True)
        if not ratio and not rescale:
            kept = (x, out, uncond) if clip else (None, None, None)
            ddim_step.backward(torch.empty_like(x), None, x, kept, step, (True, True, True, False))

    big = (2, 4, 64, 512, 512)
    yield "ddim_step-small", lambda: both(2, 4, 25, 72, 128, clip=1.0)
    yield "ddim_step-256MB", lambda: both(*big, clip=1.0)
    yield "ddim_step-256MB-noise", lambda: both(*big, seed=True, prediction="v_prediction", device_values=True)
    yield "ddim_step-channels_last-noise", lambda: both(*big, channels_last=True, seed=True, device_values=True)
    yield "ddim_step-threshold-rescale", lambda: both(*big, ratio=0.995, rescale=0.7)
    yield "ddim_step-fp32", lambda: both(2, 4, 16, 64, 64, dtype=torch.float32, clip=1.0, seed=True)
    yield "ddim_step-past-2^31", lambda: both(1, 1, 4, 2**15, 2**15, ratio=0.99, seed=True)
