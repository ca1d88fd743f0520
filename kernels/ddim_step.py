"""ddim_step: one step of a DDIM sampler in one pass over memory, and its gradient.

**Computes**
  o = u + w (c - u);  x0 from (x, o) by the prediction type;  x0 <- clamp(x0, +-L) / L or clamp(x0, +-clip);
  prev = sqrt(a') x0 + sqrt(1 - a' - sigma^2) eps + sigma z.

**Layout**
  Any dense layout that the tensors share: elements are walked in memory order. Noise from a seed belongs to logical
  positions: the same numbers for every layout. Tensors laid out otherwise are copied, and so is everything where
  samples differ and the batch is not outermost.

**Work split**
  A program owns BLOCK consecutive elements, of one sample where anything differs between samples and of the whole
  tensor otherwise; a thread twice 16 bytes of each tensor (narrower accesses where the elements are no multiple of
  16), so that 86 KB or more a multiprocessor are on their way. One launch; the rescale of guidance and the dynamic
  threshold have launches of their own before it (ddim_step_statistics.py).

**Traffic**
  Reads x, c, u and a noise tensor once, writes prev and x0 once: 4 N with guidance and without x0, 5 N with both, 1 N
  more for a noise tensor. Backward: 1 N for each gradient, 3 N more with a clip.

**Precision**
  float32, rounded once; differences of cumulative products in float64, read from the device where they are tensors.

**Resources** (sm_80, sm_90 and sm_100 alike; no spills, no shared memory)
  Registers: 48 in bfloat16, 32 in float32; 56 and 40 with a scale for each frame; 72 and 63 with noise from a seed; 64
  and 48 backward. Instructions of an element with noise from a seed, where an H200 has 55 to 69 in bfloat16 (4 N to
  5 N) and twice that in float32 before they take longer than the memory: 55 in contiguous layout; 145 where a counter
  block's four elements are not neighbours in memory (channels_last), expected 2 to 2.6 times the memory's time in
  bfloat16 and up to 1.3 in float32. The scalar part, about 130, is shared by 16 elements (8 in float32).

**Refuses**
  Gradients through the rescale and the dynamic threshold (the op's `supports`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch, philox
from .ddim_step_statistics import dynamic_limits, rescale_factors
from .ddim_step_terms import (
    alphas_of,
    coefficients,
    epsilon_of,
    gradient_of_epsilon,
    gradient_of_original,
    guidance_of_tile,
    guided,
    original_of,
    update_coefficients,
)
from .ddim_step_walk import PREDICTIONS, Step, Walk, configuration, lanes, shared_arguments, tiles_of, walk_through
from .dense_layout import buffer, laid_out, logical_index, written_back

_INT32 = 2**31
_Optional = torch.Tensor | None


@triton.jit
def _noise(
    noise_ptr, seed_ptr, offset, index, mask, first, base, sizes, strides,
    RANK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Standard normals of a tile: read, or drawn for the elements' logical indices, which begin at `base`.

    With RUN > 1 neighbours in memory are neighbours in logical order in runs of RUN, and one block of the generator
    serves four elements.
    """
    if noise_ptr is not None:
        return tl.load(noise_ptr + offset + index, mask=mask, other=0.0).to(tl.float32)
    else:
        position = tl.arange(0, BLOCK // RUN) * RUN
        position = position + (first if WIDE else first.to(tl.int32))
        element = base + logical_index(position, sizes, strides, RANK)
        seed = tl.load(seed_ptr)
        if RUN == 1:
            return philox.normals_of_elements(element, seed)
        else:
            return philox.normals_of_runs(element >> 2, seed, RUN)


@triton.jit
def _put(pointer, offset, index, values, mask):
    if pointer is not None:
        tl.store(pointer + offset + index, launch.narrow(values, pointer.dtype.element_ty), mask=mask)


@triton.jit
def ddim_step_fwd_kernel(
    sample_ptr, output_ptr, uncond_ptr, alpha_t_ptr, alpha_prev_ptr, guidance_ptr,
    alpha_t: tl.float64, alpha_prev: tl.float64, guidance: tl.float32,
    stride_at, stride_ap, stride_gb, stride_gt, run, frames, elements,
    noise_ptr, seed_ptr, prev_ptr, original_ptr, factor_ptr, limit_ptr,
    clip, eta: tl.float64, sizes, strides,
    PREDICTION: tl.constexpr, RUN_COVERS_TILE: tl.constexpr, CLIPPED: tl.constexpr,
    RANK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """prev and x0 of BLOCK elements of a sample."""
    NOISY: tl.constexpr = noise_ptr is not None or seed_ptr is not None
    pid = tl.program_id(0)
    tiles = tl.cdiv(tl.cast(elements, tl.int64), BLOCK).to(tl.int32)
    b = (pid // tiles).to(tl.int64)
    first = (pid % tiles).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    mask = index < elements - first
    offset = b * elements + first

    x = tl.load(sample_ptr + offset + index, mask=mask, other=0.0).to(tl.float32)
    scale = guidance_of_tile(
        guidance_ptr, guidance, stride_gb, stride_gt, run, frames, b, first, index, RUN_COVERS_TILE
    )
    output = guided(output_ptr, uncond_ptr, offset, index, mask, scale)
    if factor_ptr is not None:
        output *= tl.load(factor_ptr + b)
    a, following = alphas_of(alpha_t_ptr, alpha_prev_ptr, alpha_t, alpha_prev, stride_at, stride_ap, b)
    signal, spread, per_signal, per_spread = coefficients(a)
    of_original, of_epsilon, sigma = update_coefficients(a, following, eta, NOISY)

    x0 = original_of(x, output, signal, spread, per_signal, PREDICTION)
    if limit_ptr is not None:
        limit = tl.load(limit_ptr + b)
        x0 = tl.clamp(x0, -limit, limit, propagate_nan=tl.PropagateNan.ALL) * tl.div_rn(1.0, limit)
    elif clip is not None:
        x0 = tl.clamp(x0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    if CLIPPED:
        epsilon = tl.fma(-signal, x0, x) * per_spread
    else:
        epsilon = epsilon_of(x, output, signal, spread, per_spread, PREDICTION)
    prev = tl.fma(of_original, x0, of_epsilon * epsilon)
    if NOISY:
        z = _noise(
            noise_ptr, seed_ptr, offset, index, mask, first, b * elements, sizes, strides, RANK, RUN, WIDE, BLOCK
        )
        prev = tl.fma(sigma, z, prev)
    _put(prev_ptr, offset, index, prev, mask)
    _put(original_ptr, offset, index, x0, mask)


@triton.jit
def ddim_step_bwd_kernel(
    sample_ptr, output_ptr, uncond_ptr, alpha_t_ptr, alpha_prev_ptr, guidance_ptr,
    alpha_t: tl.float64, alpha_prev: tl.float64, guidance: tl.float32,
    stride_at, stride_ap, stride_gb, stride_gt, run, frames, elements,
    grad_prev_ptr, grad_original_ptr, d_sample_ptr, d_output_ptr, d_uncond_ptr, d_noise_ptr,
    clip, eta: tl.float64,
    PREDICTION: tl.constexpr, RUN_COVERS_TILE: tl.constexpr, CLIPPED: tl.constexpr,
    NOISY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK elements of a sample.

    The step is linear but for the clip: gradients are fixed multiples of grad_prev and grad_original, and where x0 was
    clipped nothing flows through it.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(tl.cast(elements, tl.int64), BLOCK).to(tl.int32)
    b = (pid // tiles).to(tl.int64)
    first = (pid % tiles).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    mask = index < elements - first
    offset = b * elements + first

    scale = guidance_of_tile(
        guidance_ptr, guidance, stride_gb, stride_gt, run, frames, b, first, index, RUN_COVERS_TILE
    )
    a, following = alphas_of(alpha_t_ptr, alpha_prev_ptr, alpha_t, alpha_prev, stride_at, stride_ap, b)
    signal, spread, per_signal, per_spread = coefficients(a)
    of_original, of_epsilon, sigma = update_coefficients(a, following, eta, NOISY)

    g = tl.zeros((BLOCK,), tl.float32)
    if grad_prev_ptr is not None:
        g = tl.load(grad_prev_ptr + offset + index, mask=mask, other=0.0).to(tl.float32)
    g_x0 = of_original * g
    if grad_original_ptr is not None:
        g_x0 += tl.load(grad_original_ptr + offset + index, mask=mask, other=0.0).to(tl.float32)
    g_epsilon = of_epsilon * g
    if CLIPPED:
        dx, d_output = per_spread * g_epsilon, tl.zeros_like(g)
        g_x0 -= signal * dx
    else:
        dx, d_output = gradient_of_epsilon(g_epsilon, signal, spread, per_spread, PREDICTION)
    if clip is not None:
        x = tl.load(sample_ptr + offset + index, mask=mask, other=0.0).to(tl.float32)
        output = guided(output_ptr, uncond_ptr, offset, index, mask, scale)
        x0 = original_of(x, output, signal, spread, per_signal, PREDICTION)
        g_x0 = tl.where((x0 <= clip) & (x0 >= -clip), g_x0, 0.0)
    from_x, from_output = gradient_of_original(g_x0, signal, spread, per_signal, PREDICTION)
    dx += from_x
    d_output += from_output

    _put(d_sample_ptr, offset, index, dx, mask)
    _put(d_output_ptr, offset, index, scale * d_output, mask)
    _put(d_uncond_ptr, offset, index, (1.0 - scale) * d_output, mask)
    _put(d_noise_ptr, offset, index, sigma * g, mask)


# ---- launches -------------------------------------------------------------------------------------------------------


def forward(
    sample: torch.Tensor, model_output: torch.Tensor, uncond_output: _Optional, noise: _Optional, noise_seed: _Optional,
    step: Step, return_pred_original: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The previous sample and x0; an empty tensor for an x0 that is not wanted."""
    prev = torch.empty_like(sample)
    original = torch.empty_like(sample) if return_pred_original else sample.new_empty(0)
    if not sample.numel():
        return prev, original
    seeded = noise_seed is not None
    walk = walk_through(prev, step, step.guidance_rescale > 0 or step.threshold_max > 0, seeded)
    inputs = [laid_out(t, walk.like) for t in (sample, model_output, uncond_output)]
    written = [buffer(t, walk.like) for t in (prev, original if return_pred_original else None)]
    run = _elements_drawn_together(walk, sample.dtype) if seeded else 1
    runs = walk.runs if seeded else walk.runs[-1:]
    chosen = configuration(
        "ddim_step_fwd", sample.dtype, f"draws{run}" if seeded else "reads", 1 if seeded and run == 1 else 2
    )
    block = chosen["BLOCK"]
    with launch.on_device(sample):
        factors = limits = None
        if step.guidance_rescale > 0:
            factors = rescale_factors(walk, inputs, step)
        if step.threshold_max > 0:
            limits = dynamic_limits(walk, inputs, step, factors)
        ddim_step_fwd_kernel[(walk.batch * tiles_of(walk, block),)](
            *shared_arguments(walk, inputs, step),
            laid_out(noise, walk.like), noise_seed, *written, factors, limits,
            step.clip_sample, step.eta, *_sizes_and_strides(runs),
            PREDICTION=PREDICTIONS[step.prediction_type],
            RUN_COVERS_TILE=walk.run is not None and walk.run >= block,
            CLIPPED=step.use_clipped_model_output,
            RANK=len(runs),
            RUN=run,
            WIDE=walk.elements >= _INT32,
            **chosen,
        )  # fmt: skip
    return written_back(prev, written[0]), written_back(original, written[1])


def _elements_drawn_together(walk: Walk, dtype: torch.dtype) -> int:
    """How many neighbours in memory are neighbours in logical order, begin at a multiple of 4 and fit 16 bytes."""
    size, stride = walk.runs[-1]
    length = size if len(walk.runs) > 1 else walk.elements if walk.batch > 1 else 8
    if stride == 1 and length % 4 == 0:
        return lanes(dtype) if length % 8 == 0 or len(walk.runs) == 1 else 4
    return 1


def _sizes_and_strides(runs: list[tuple[int, int]]) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Sizes of the inner runs and logical strides of all; None where memory order is the logical one."""
    if len(runs) == 1:
        return None, None
    sizes, strides = zip(*runs, strict=True)
    return sizes[1:], strides


def backward(
    grad_prev: _Optional, grad_original: _Optional, like: torch.Tensor, clipped: tuple[_Optional, _Optional, _Optional],
    step: Step, wanted: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of sample, model_output, uncond_output and noise; an empty tensor for one that is not wanted.

    `clipped`: the three inputs where x0 was clipped, else None each. `like`: any tensor with the sample's strides.
    """
    grads = [torch.empty_like(like) if w else like.new_empty(0) for w in wanted]
    if not like.numel():
        return tuple(grads)
    walk = walk_through(torch.empty_like(like), step, sized=False, seeded=False)
    inputs = [laid_out(t, walk.like) for t in clipped]
    written = [buffer(g if w else None, walk.like) for g, w in zip(grads, wanted, strict=True)]
    chosen = configuration("ddim_step_bwd", like.dtype, "clips" if step.clip_sample is not None else "reads", 2)
    block = chosen["BLOCK"]
    with launch.on_device(like):
        ddim_step_bwd_kernel[(walk.batch * tiles_of(walk, block),)](
            *shared_arguments(walk, inputs, step),
            laid_out(grad_prev, walk.like), laid_out(grad_original, walk.like), *written,
            step.clip_sample, step.eta,
            PREDICTION=PREDICTIONS[step.prediction_type],
            RUN_COVERS_TILE=walk.run is not None and walk.run >= block,
            CLIPPED=step.use_clipped_model_output,
            NOISY=step.eta > 0,
            **chosen,
        )  # fmt: skip
    return tuple(map(written_back, grads, written))
