"""ddim_step's CPU kernels (csrc/cpu/ddim_step.cpp)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from . import DTYPE_CODES, address, library, threads, wide

if TYPE_CHECKING:
    from fastvdiff.ops.ddim_step import Step

_PREDICTION_CODES = {"epsilon": 0, "sample": 1, "v_prediction": 2}
_MAX_RANK = 8
_Optional = torch.Tensor | None


def forward(
    sample: torch.Tensor, model_output: torch.Tensor, uncond_output: _Optional, noise: _Optional, noise_seed: _Optional,
    step: Step, return_pred_original: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The previous sample and x0; an empty tensor for an x0 that is not wanted."""
    prev = torch.empty_like(sample)
    original = torch.empty_like(sample) if return_pred_original else sample.new_empty(0)
    if not sample.numel():
        return prev, original
    like = _common_layout(prev)
    inputs = [_laid_out(t, like) for t in (sample, model_output, uncond_output, noise)]
    lib = library()
    params, _kept = _params(like, inputs, noise_seed, step)
    sized = step.guidance_rescale > 0 or step.threshold_max > 0
    workspace = (
        torch.empty((lib.ddim_step_workspace(params) + 7) // 8, dtype=torch.int64, device="cpu") if sized else None
    )
    outputs = [_laid_out_empty(t, like) for t in (prev, original if return_pred_original else None)]
    lib.ddim_step_forward(params, address(workspace), *(address(t) for t in outputs))
    prev = _written_back(prev, outputs[0])
    return prev, _written_back(original, outputs[1]) if return_pred_original else original


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
    layout = _common_layout(torch.empty_like(like))
    inputs = [*(_laid_out(t, layout) for t in clipped), None]
    incoming = [_laid_out(t, layout) for t in (grad_prev, grad_original)]
    params, _kept = _params(layout, inputs, None, step)
    outputs = [_laid_out_empty(g, layout) if w else None for g, w in zip(grads, wanted, strict=True)]
    library().ddim_step_backward(params, *(address(t) for t in (*incoming, *outputs)))
    return tuple(g if o is None else _written_back(g, o) for g, o in zip(grads, outputs, strict=True))


def _common_layout(like: torch.Tensor) -> torch.Tensor:
    """A dense tensor whose strides the kernel can walk: like's own, or contiguous where the batch is not outermost."""
    if like.is_contiguous() and like.dim() <= _MAX_RANK:
        return like
    outermost = all(n == 1 or like.stride(0) >= s for n, s in zip(like.shape, like.stride(), strict=True))
    if (like.shape[0] == 1 or outermost) and like.dim() <= _MAX_RANK:
        return like
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _same_layout(t: torch.Tensor, like: torch.Tensor) -> bool:
    if t.is_contiguous() and like.is_contiguous():  # what a call usually has, and cheaper to ask than strides
        return True
    strides, expected = t.stride(), like.stride()
    if strides == expected:
        return True
    return all(n == 1 or a == b for n, a, b in zip(like.shape, strides, expected, strict=True))


def _laid_out(t: _Optional, like: torch.Tensor) -> _Optional:
    """t with like's strides: itself where it has them, else a copy."""
    if t is None or _same_layout(t, like):
        return t
    return torch.empty_like(like).copy_(t)


def _laid_out_empty(t: _Optional, like: torch.Tensor) -> _Optional:
    """Where the kernel writes t: t itself, or a buffer with like's strides."""
    return t if t is None or _same_layout(t, like) else torch.empty_like(like)


def _written_back(t: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    return t if buffer is t else t.copy_(buffer)


def _params(
    like: torch.Tensor, inputs: list[_Optional], noise_seed: _Optional, step: Step
) -> tuple[Any, list[_Optional]]:
    """The kernel's parameters, and the tensors that must outlive them."""
    shape = like.shape
    batch, elements = shape[0], like.numel() // shape[0]
    guidance, run, frames, strides = wide(step.guidance), elements, 1, (0, 0)
    memory_order = [] if like.is_contiguous() else _memory_order(like)
    if guidance is not None and guidance.dim() == 2:
        strides = (guidance.stride(0) * (guidance.shape[0] > 1), guidance.stride(1))
        if guidance.shape[1] > 1:
            order = memory_order or list(range(like.dim()))
            run, frames = math.prod(shape[d] for d in order[order.index(2) + 1 :]), shape[2]
    logical_strides = [math.prod(shape[d + 1 :]) for d in memory_order]
    seed = None if noise_seed is None else noise_seed.contiguous()
    alphas = [_per_sample(a, batch) for a in (step.alpha_t, step.alpha_prev)]
    params = library().DdimStepParams(
        (batch, elements, run, frames, *strides),
        [shape[d] for d in memory_order],
        logical_strides,
        (
            step.alpha_t_value, step.alpha_prev_value, step.eta, step.threshold_ratio, step.threshold_max,
            math.inf if step.clip_sample is None else step.clip_sample, step.guidance_value, step.guidance_rescale,
        ),
        [address(t) for t in (*inputs, seed, *alphas, guidance)],
        step.use_clipped_model_output,
        _PREDICTION_CODES[step.prediction_type],
        DTYPE_CODES[like.dtype],
        threads(),
    )  # fmt: skip
    return params, [*inputs, seed, *alphas, guidance]


def _memory_order(like: torch.Tensor) -> list[int]:
    """The dimensions from the outermost in memory inward: the batch, then by stride."""
    inner = sorted(range(1, like.dim()), key=lambda d: (-like.stride(d), like.shape[d] > 1))
    return [0, *inner]


def _per_sample(alpha: _Optional, batch: int) -> _Optional:
    """A cumulative product for every sample, float64."""
    return None if alpha is None else alpha.detach().to(torch.float64).expand(batch).contiguous()
