"""Every case that is measured on a GPU: the standard shapes, forward and backward, in both memory formats."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import eager, gpu_convolutions, sdpa, targets, traffic
from benchmarks.cases import frames_first
from benchmarks.gpu_case import Draw, GpuCase, Tensors, passes
from benchmarks.shapes import ANIMATEDIFF, SVD, VAE, VDM, Level
from fastvdiff import ops

_TUNED = "max-autotune-no-cudagraphs"


def _compile_mode(training: bool, headline: bool) -> str | None:
    """Autotuned where the result is shown first, as it comes elsewhere; a training step only where it is shown."""
    if headline:
        return "default" if training else _TUNED
    return None if training else "default"


# ---- group_norm_silu -------------------------------------------------------------------------------------------------

_GROUP_NORM_HEADLINES = {"vae-1x128x20x256x256", "vae-1x512x8x45x80", "svd-l0 scale shift"}


def _group_norm_silu(level: Level, groups: int, modulated: bool, training: bool, channels_last: bool) -> GpuCase:
    batch, channels = level.batch, level.channels
    label = f"{level.name} scale shift" if modulated else level.name
    width = channels // groups

    def tensors(draw: Draw) -> Tensors:
        modulation = (draw.normal(batch, channels), draw.normal(batch, channels)) if modulated else ()
        return (draw.normal(*level.clip), draw.normal(channels), draw.normal(channels), *modulation)

    def baseline(x: Any, weight: Any, bias: Any, scale: Any = None, shift: Any = None) -> torch.Tensor:
        return eager.group_norm_silu(x, x.shape[1] // width, weight, bias, scale, shift)

    def fast(x: Any, weight: Any, bias: Any, scale: Any = None, shift: Any = None, *, impl: str) -> torch.Tensor:
        return ops.group_norm_silu(x, groups, weight, bias, scale=scale, shift=shift, impl=impl)

    work = traffic.group_norm_silu(level.clip, training=training)
    headline = label in _GROUP_NORM_HEADLINES
    return GpuCase(
        "group_norm_silu", label, work, tensors, baseline, fast,
        axes=(1, 0, 0, 1, 1)[: 5 if modulated else 3], out_axis=1, grain=width,
        training=training, channels_last=channels_last, compile_mode=_compile_mode(training, headline),
        headline=headline,
    )  # fmt: skip


def _group_norms() -> list[GpuCase]:
    levels = [(level, 32) for level in (*VAE, *SVD, *ANIMATEDIFF)] + [(level, 8) for level in VDM]
    return [
        case
        for level, groups in levels
        for modulated in (False, True)
        for case in passes(partial(_group_norm_silu, level, groups, modulated))
    ]


# ---- temporal_attention ----------------------------------------------------------------------------------------------

_ATTENTION_HEADLINES = {"svd-l0", "animatediff-l0", "vdm-l0 bias rotary"}


def _temporal_attention(level: Level, positioned: bool, training: bool, channels_last: bool) -> GpuCase:
    heads, dim, frames = level.heads, level.dim, level.frames
    label = f"{level.name} bias rotary" if positioned else level.name
    shape = (level.batch, level.inner, *level.clip[2:])

    def tensors(draw: Draw) -> Tensors:
        clips = tuple(draw.normal(*shape) for _ in range(3))
        return (*clips, draw.normal(heads, frames, frames), *_rotary(frames, dim, draw.device)) if positioned else clips

    def fast(q: Any, k: Any, v: Any, bias: Any = None, cos: Any = None, sin: Any = None, *, impl: str) -> torch.Tensor:
        views = (frames_first(t, heads) for t in (q, k, v))
        rotary = None if cos is None else (cos, sin)
        y = ops.temporal_attention(*views, attn_bias=bias, rotary=rotary, impl=impl)
        return y.permute(0, 3, 4, 1, 2).flatten(1, 2).unflatten(3, q.shape[3:])

    work = traffic.temporal_attention(level.sequences, frames, dim, training=training)
    headline = label in _ATTENTION_HEADLINES
    return GpuCase(
        "temporal_attention", label, work, tensors, partial(eager.temporal_attention, heads=heads), fast,
        axes=(3, 3, 3, None, None, None)[: 6 if positioned else 3], out_axis=3, differentiable=4 if positioned else 3,
        training=training, channels_last=channels_last, baselines=sdpa.baselines(heads),
        compile_mode=_compile_mode(training, headline), headline=headline,
    )  # fmt: skip


def _rotary(frames: int, dim: int, device: str) -> Tensors:
    """(cos, sin), each (T, D/2) float32, at the usual base of 10,000."""
    inverse = 10_000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
    angles = torch.arange(frames, device=device)[:, None] * inverse
    return angles.cos(), angles.sin()


def _attentions() -> list[GpuCase]:
    plain = [(level, False) for level in (*SVD, *ANIMATEDIFF, *VDM)]
    return [
        case
        for level, positioned in [*plain, *((level, True) for level in VDM)]
        for case in passes(partial(_temporal_attention, level, positioned))
    ]


# ---- temporal_attention_block ----------------------------------------------------------------------------------------


def _block(level: Level, training: bool, channels_last: bool) -> GpuCase:
    channels, heads, inner = level.channels, level.heads, level.inner

    def tensors(draw: Draw) -> Tensors:
        into = (draw.normal(inner, channels, scale=channels**-0.5) for _ in range(3))
        out = draw.normal(channels, inner, scale=inner**-0.5)
        return (draw.normal(*level.clip), *into, out, *(draw.normal(channels) for _ in range(3)))

    def fast(
        x: Any, q: Any, k: Any, v: Any, out: Any, out_bias: Any, weight: Any, bias: Any, *, impl: str
    ) -> torch.Tensor:
        named = {"out_bias": out_bias, "norm_weight": weight, "norm_bias": bias}
        return ops.temporal_attention_block(x, q, k, v, out, heads=heads, impl=impl, **named)

    positions = level.height * level.width
    work = traffic.temporal_attention_block(
        level.batch, channels, level.frames, positions, inner, training=training
    )  # fmt: skip
    first = level.name == "vdm-l0"
    return GpuCase(
        "temporal_attention_block", level.name, work, tensors, partial(eager.temporal_attention_block, heads=heads),
        fast, axes=(3, *[None] * 7), out_axis=3, training=training, channels_last=channels_last,
        compile_mode=_compile_mode(training, first), headline=first,
    )  # fmt: skip


def _blocks() -> list[GpuCase]:
    return [case for level in (*VDM, SVD[0], ANIMATEDIFF[0]) for case in passes(partial(_block, level))]


# ---- geglu -----------------------------------------------------------------------------------------------------------


def _geglu(level: Level, training: bool, _: bool) -> GpuCase:
    """Of a feed-forward layer on the level's tokens, four times as wide as its channels."""
    frames, positions, width = level.batch * level.frames, level.height * level.width, 4 * level.channels
    return GpuCase(
        "geglu", level.name, traffic.geglu(frames * positions, width, training=training),
        lambda draw: (draw.normal(frames, positions, 2 * width),), eager.geglu, ops.geglu,
        axes=(0,), out_axis=0, training=training, compile_mode=_compile_mode(training, level is SVD[0]),
        headline=level is SVD[0],
    )  # fmt: skip


def _geglus() -> list[GpuCase]:
    return [case for level in (*SVD, *ANIMATEDIFF) for case in passes(partial(_geglu, level), (False,))]


# ---- ddim_step -------------------------------------------------------------------------------------------------------

_ALPHAS = (0.5, 0.6)
_GUIDANCE = 7.5
_THRESHOLD = (0.995, 100.0)  # guided x0 of normal noise has its quantile at 28: between the bounds, the longer way
_LATENTS = {"svd latents": (1, 4, 25, 72, 128), "animatediff latents": (1, 4, 16, 64, 64)}
_LARGE = {"256 MB": (8, 4, 64, 256, 256)}


def _ddim_step(label: str, shape: tuple[int, ...], kind: str) -> GpuCase:
    options = {
        "clip": {"clip_sample": 1.0},
        "noise": {"clip_sample": 1.0, "eta": 1.0},
        "threshold": {"dynamic_threshold": _THRESHOLD},
    }[kind]
    noisy = kind == "noise"

    def tensors(draw: Draw) -> Tensors:
        clips = tuple(draw.normal(*shape) for _ in range(3))
        return (*clips, torch.tensor([2026], device=draw.device)) if noisy else clips

    def fast(x: Any, conditional: Any, unconditional: Any, seed: Any = None, *, impl: str) -> Any:
        return ops.ddim_step(
            x, conditional, *_ALPHAS, uncond_output=unconditional, guidance_scale=_GUIDANCE, noise_seed=seed, impl=impl,
            **options,
        )  # fmt: skip

    baseline = {"clip": _eager_clip, "noise": _eager_noise, "threshold": _eager_threshold}[kind]
    work = traffic.ddim_step(shape, threshold=kind == "threshold")
    headline = label in _LARGE and kind == "clip"
    # The quantile of a threshold needs whole samples, and noise is drawn by position in the whole tensor.
    axis = {"clip": 2, "noise": None, "threshold": 0}[kind]
    return GpuCase(
        "ddim_step", f"{label} guidance {kind}", work, tensors, baseline, fast,
        axes=() if noisy else (axis,) * 3, out_axis=axis, draws=noisy,
        oracle=None if kind == "clip" else partial(fast, impl="reference"),  # torch.quantile stops at 16M elements
        compile_mode=_compile_mode(False, headline), headline=headline,
    )  # fmt: skip


def _eager_clip(x: Any, conditional: Any, unconditional: Any) -> Any:
    return eager.ddim_step(x, conditional, unconditional, *_ALPHAS, _GUIDANCE, 1.0)


def _eager_noise(x: Any, conditional: Any, unconditional: Any, seed: Any) -> Any:
    return eager.ddim_step_noise(x, conditional, unconditional, *_ALPHAS, _GUIDANCE, 1.0)


def _eager_threshold(x: Any, conditional: Any, unconditional: Any) -> Any:
    return eager.ddim_step_threshold(x, conditional, unconditional, *_ALPHAS, _GUIDANCE, *_THRESHOLD)


def _steps() -> list[GpuCase]:
    shapes = {**_LATENTS, **_LARGE}
    return [
        _ddim_step(label, shape, kind) for label, shape in shapes.items() for kind in ("clip", "noise", "threshold")
    ]


def _aimed(case: GpuCase) -> GpuCase:
    return replace(case, target_us=targets.microseconds(case.op, case.name, case.work))


CASES = tuple(
    map(_aimed, (*_group_norms(), *_attentions(), *_blocks(), *_geglus(), *_steps(), *gpu_convolutions.cases()))
)
