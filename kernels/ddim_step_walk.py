"""How the kernels of ddim_step go through memory, and the arguments that all of them begin with."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch

from . import launch
from .ddim_step_terms import EPSILON, SAMPLE
from .dense_layout import logical_runs, memory_order

PREDICTIONS = {"epsilon": EPSILON.value, "sample": SAMPLE.value, "v_prediction": 2}
_MAX_RUNS = 3  # of philox's walk in other layouts: two divisions an element
_Optional = torch.Tensor | None


class Step(Protocol):
    """What a step and its gradient share beside the big tensors: `fastvdiff.ops.ddim_step.Step`."""

    alpha_t: _Optional
    alpha_t_value: float
    alpha_prev: _Optional
    alpha_prev_value: float
    guidance: _Optional
    guidance_value: float
    guidance_rescale: float
    prediction_type: str
    eta: float
    clip_sample: float | None
    threshold_ratio: float
    threshold_max: float
    use_clipped_model_output: bool


class Walk(NamedTuple):
    """How the kernels go through memory."""

    like: torch.Tensor  # has the layout walked
    batch: int  # samples, where they may differ in a coefficient; 1 where the whole tensor is walked as one
    elements: int  # of each
    run: int | None  # elements of a frame that lie together; None where guidance does not differ between frames
    runs: list[tuple[int, int]]  # (size, logical stride) from the outermost in memory inward, for noise from a seed


def walk_through(like: torch.Tensor, step: Step, sized: bool, seeded: bool) -> Walk:
    """The way through tensors with like's layout, or contiguous ones where that layout does not suit."""
    shape, guidance = like.shape, step.guidance
    batch, numel = shape[0], like.numel()
    over = guidance.shape if guidance is not None and guidance.dim() == 2 else (1, 1)
    alphas = (step.alpha_t, step.alpha_prev)
    apart = batch > 1 and (sized or over[0] > 1 or any(a is not None and a.dim() > 0 for a in alphas))
    contiguous = like.is_contiguous()
    if contiguous and over[1] == 1:
        order, runs = [], [(0, 1)]
    else:
        order = memory_order(like)
        apart = apart or (seeded and not contiguous and batch > 1)
        runs = logical_runs(shape, order[1:] if apart else order)
        if (apart and order[0] != 0) or (seeded and len(runs) > _MAX_RUNS):
            return walk_through(torch.empty_like(like, memory_format=torch.contiguous_format), step, sized, seeded)
    run = math.prod(shape[d] for d in order[order.index(2) + 1 :]) if over[1] > 1 else None
    return Walk(like, batch if apart else 1, numel // batch if apart else numel, run, runs)


def shared_arguments(walk: Walk, inputs: list[_Optional], step: Step) -> tuple[Any, ...]:
    """The arguments that all the kernels begin with."""
    guidance = step.guidance
    strides = (0, None)
    if guidance is not None and guidance.dim() == 2:
        strides = tuple(s * (n > 1) for s, n in zip(guidance.stride(), guidance.shape, strict=True))
    at, ap = (None if a is None else a.stride(0) if a.dim() else 0 for a in (step.alpha_t, step.alpha_prev))
    return (
        *inputs, step.alpha_t, step.alpha_prev, guidance,
        step.alpha_t_value, step.alpha_prev_value, step.guidance_value,
        at, ap, *strides, walk.run, None if walk.run is None else walk.like.shape[2], walk.elements,
    )  # fmt: skip


def tiles_of(walk: Walk, block: int) -> int:
    """Tiles of a sample (triton.cdiv takes 2 us)."""
    return -(-walk.elements // block)


def lanes(dtype: torch.dtype) -> int:
    """Elements of a 16-byte access."""
    return 16 // dtype.itemsize


def configuration(kernel: str, dtype: torch.dtype, kind: str, accesses: int) -> launch.Configuration:
    """`accesses` of 16 bytes to each tensor in a thread: more share its sample's coefficients, fewer take registers."""
    lane_elements = lanes(dtype)

    def of(warps: int, accesses: int) -> launch.Configuration:
        return {"BLOCK": 32 * warps * lane_elements * accesses, "num_warps": warps, "num_stages": 1}

    def candidates() -> list[launch.Configuration]:
        return [of(warps, n) for warps in (2, 4, 8) for n in (1, 2, 4)]

    return launch.configuration(kernel, f"{dtype.itemsize}byte-{kind}", of(4, accesses), candidates)
