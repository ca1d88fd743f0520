"""One step of a DDIM sampler in one pass over memory: guidance, x0, threshold or clip, update and noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from fastvdiff import checks, dispatch
from fastvdiff.reference.ddim_step import PREDICTION_TYPES
from fastvdiff.reference.ddim_step import ddim_step as _reference

from . import registration

_OP = "ddim_step"
_Optional = torch.Tensor | None


def ddim_step(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    alpha_t: float | torch.Tensor,
    alpha_prev: float | torch.Tensor,
    *,
    uncond_output: torch.Tensor | None = None,
    guidance_scale: float | torch.Tensor = 1.0,
    guidance_rescale: float = 0.0,
    prediction_type: str = "epsilon",
    eta: float = 0.0,
    noise: torch.Tensor | None = None,
    noise_seed: torch.Tensor | None = None,
    clip_sample: float | None = None,
    dynamic_threshold: tuple[float, float] | None = None,
    use_clipped_model_output: bool = False,
    return_pred_original: bool = True,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """From x_t to the x of the next, less noisy timestep.

    Equivalent to (for epsilon prediction)::

        out = uncond_output + guidance_scale * (model_output - uncond_output)
        out = out * (r * std(model_output) / std(out) + 1 - r)           # guidance_rescale = r, std per sample
        x0 = (sample - sqrt(1 - alpha_t) * out) / sqrt(alpha_t)
        x0 = x0.clamp(-clip_sample, clip_sample)                         # or the dynamic threshold
        eps = out                                                        # or again from the clipped x0
        sigma = eta * sqrt((1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev))
        prev = sqrt(alpha_prev) * x0 + sqrt(1 - alpha_prev - sigma**2) * eps + sigma * noise

    computed in float32 (float64 for float64 samples) and rounded once. Autocast leaves it alone.

    Args:
        sample: x_t, (B, C, T, H, W), or any shape with the batch first; float32, bfloat16, float16 or float64, any
            strides.
        model_output: what the model predicts, of the sample's shape.
        alpha_t, alpha_prev: cumulative products at this timestep and the next, in [0, 1]: floats, or 0-dim or (B,)
            tensors on the sample's device.
        uncond_output: the prediction without the condition, of the sample's shape; switches guidance on.
        guidance_scale: a float, a 0-dim tensor, or one value per sample and frame: (B, 1), (1, T) or (B, T), where T
            is 1 unless the sample is 5-D.
        guidance_rescale: in [0, 1], how far the guided output's spread is pulled back to the conditional one's.
        prediction_type: "epsilon", "v_prediction" or "sample".
        eta: 0 adds no noise (DDIM), 1 as much as DDPM.
        noise: standard normal, of the sample's shape; needed for eta > 0 unless there is a `noise_seed`.
        noise_seed: int64 (1,) on the sample's device, read when the step runs: the noise is drawn inside, from
            Philox4x32-10 (see fastvdiff/reference/philox.py), the same for every layout and implementation.
        clip_sample: x0 is clamped to +- this; None leaves it.
        dynamic_threshold: (ratio, max): x0 is clamped to +-s and divided by s, s the ratio quantile of |x0| over each
            sample between 1 and max. Wins over the clip.
        use_clipped_model_output: derive epsilon from the clipped x0.
        return_pred_original: False saves writing x0.
        impl: None, or the implementation to use, strictly: "cpu", "triton" or "reference".

    Returns:
        (prev_sample, pred_original_sample or None), of the sample's shape, memory format and dtype. Gradients flow to
        sample, model_output, uncond_output and noise.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        NotImplementedError: `impl` does not support the call.

    Source: Song et al., "Denoising Diffusion Implicit Models", arXiv:2010.02502, equations 12 and 16; rescale:
    arXiv:2305.08891, section 3.4; dynamic threshold: arXiv:2205.11487, section 2.3.
    """
    _check_tensors(sample, model_output, uncond_output, noise, noise_seed)
    _check_alpha("alpha_t", alpha_t, sample)
    _check_alpha("alpha_prev", alpha_prev, sample)
    _check_guidance(sample, uncond_output, guidance_scale, guidance_rescale)
    _check_options(prediction_type, eta, noise, noise_seed, clip_sample, dynamic_threshold)
    if eta == 0:
        noise = noise_seed = None
    coefficients = [t for t in (alpha_t, alpha_prev, guidance_scale) if isinstance(t, torch.Tensor)]
    facts = dispatch.facts_of(
        sample,
        dispatch.needs_grad(sample, model_output, uncond_output, noise),
        dtypes=tuple(t.dtype for t in (model_output, uncond_output, noise) if t is not None),
        coefficients_need_grad=dispatch.needs_grad(*coefficients),
        rescale=guidance_rescale > 0,
        threshold=dynamic_threshold is not None,
    )
    return dispatch.choose(_OP, facts, impl).call(
        sample, model_output, alpha_t, alpha_prev, uncond_output, guidance_scale, guidance_rescale, prediction_type,
        eta, noise, noise_seed, clip_sample, dynamic_threshold, use_clipped_model_output, return_pred_original,
    )  # fmt: skip


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_tensors(
    sample: torch.Tensor, model_output: torch.Tensor, uncond_output: _Optional, noise: _Optional, noise_seed: _Optional
) -> None:
    checks.tensor(_OP, "sample", sample)
    checks.floating(_OP, "sample", sample)
    if sample.dim() < 2:
        checks.fail(_OP, "sample", "two dimensions or more, the batch first", f"shape {tuple(sample.shape)}")
    if model_output is None:
        checks.fail(_OP, "model_output", "a tensor", "None", TypeError)
    shape = tuple(sample.shape)
    for name, value in (("model_output", model_output), ("uncond_output", uncond_output), ("noise", noise)):
        checks.parameter(_OP, name, value, sample, "sample", shape, symbols="of sample")
    if noise_seed is not None:
        checks.tensor(_OP, "noise_seed", noise_seed)
        checks.same_device(_OP, "noise_seed", noise_seed, sample, "sample")
        if noise_seed.dtype != torch.int64 or tuple(noise_seed.shape) != (1,):
            checks.fail(_OP, "noise_seed", "an int64 tensor of shape (1,)", checks.describe(noise_seed))


def _check_alpha(name: str, alpha: float | torch.Tensor, sample: torch.Tensor) -> None:
    if isinstance(alpha, torch.Tensor):
        checks.parameter(_OP, name, alpha, sample, "sample", (), (sample.shape[0],), symbols="() or (B,)")
    elif isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        checks.fail(_OP, name, "a float in [0, 1], or a tensor of them", checks.describe(alpha))


def _check_guidance(
    sample: torch.Tensor, uncond_output: _Optional, scale: float | torch.Tensor, rescale: float
) -> None:
    if not 0 <= rescale <= 1:
        checks.fail(_OP, "guidance_rescale", "a float in [0, 1]", checks.describe(rescale))
    if isinstance(scale, torch.Tensor):
        batch, frames = sample.shape[0], sample.shape[2] if sample.dim() == 5 else 1
        allowed = [(), (1, 1), (batch, 1), (1, frames), (batch, frames)]
        checks.parameter(
            _OP,
            "guidance_scale",
            scale,
            sample,
            "sample",
            *dict.fromkeys(allowed),
            symbols="(), (B, 1), (1, T) or (B, T)",
        )
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        checks.fail(_OP, "guidance_scale", "a float or a tensor", checks.describe(scale), TypeError)
    if uncond_output is None and (isinstance(scale, torch.Tensor) or scale != 1 or rescale > 0):
        checks.fail(_OP, "uncond_output", "a tensor, as there is a guidance_scale or guidance_rescale", "None")


def _check_options(
    prediction_type: str, eta: float, noise: _Optional, noise_seed: _Optional, clip_sample: float | None,
    dynamic_threshold: tuple[float, float] | None,
) -> None:  # fmt: skip
    if prediction_type not in PREDICTION_TYPES:
        checks.fail(_OP, "prediction_type", " or ".join(map(repr, PREDICTION_TYPES)), checks.describe(prediction_type))
    if not eta >= 0:
        checks.fail(_OP, "eta", "a float from 0 upward", checks.describe(eta))
    if noise is not None and noise_seed is not None:
        checks.fail(_OP, "noise_seed", "None, as there is a noise tensor", checks.describe(noise_seed))
    if eta > 0 and noise is None and noise_seed is None:
        checks.fail(_OP, "noise", f"a noise tensor or a noise_seed, as eta = {eta} > 0", "neither")
    if clip_sample is not None and not clip_sample > 0:
        checks.fail(_OP, "clip_sample", "a float above 0, or None", checks.describe(clip_sample))
    if dynamic_threshold is not None:
        pair = isinstance(dynamic_threshold, (tuple, list)) and len(dynamic_threshold) == 2
        if not pair or not (0 <= dynamic_threshold[0] <= 1 and dynamic_threshold[1] > 0):
            checks.fail(
                _OP,
                "dynamic_threshold",
                "(ratio in [0, 1], maximum above 0), or None",
                checks.describe(dynamic_threshold),
            )


# ---- the kernels ----------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What a step and its gradient share beside the big tensors, in the order of the op's schema.

    Names as in `fastvdiff.ops.ddim_step`; where a tensor is None the value beside it counts. `threshold_max` 0: none.
    """

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


def _supports(on_device: Callable[[dispatch.Facts], str | None], facts: dispatch.Facts) -> str | None:
    reason = on_device(facts)
    if reason is not None:
        return reason
    if any(d != facts.dtype and (facts.dtype != torch.float32 or d == torch.float64) for d in facts.options["dtypes"]):
        return "model outputs and noise wider than the sample: the reference rounds once"
    if facts.options["coefficients_need_grad"]:
        return "no gradients to alpha_t, alpha_prev and guidance_scale"
    if facts.needs_grad and facts.options["rescale"]:
        return "no gradient through guidance_rescale"
    if facts.needs_grad and facts.options["threshold"]:
        return "no gradient through dynamic_threshold"
    return None


def _call_kernel(
    impl: str, sample: torch.Tensor, model_output: torch.Tensor, alpha_t: Any, alpha_prev: Any,
    uncond_output: _Optional, guidance_scale: Any, guidance_rescale: float, prediction_type: str, eta: float,
    noise: _Optional, noise_seed: _Optional, clip_sample: float | None, dynamic_threshold: tuple[float, float] | None,
    use_clipped_model_output: bool, return_pred_original: bool,
) -> tuple[torch.Tensor, _Optional]:  # fmt: skip
    dtype = sample.dtype
    ratio, most = dynamic_threshold or (0.0, 0.0)
    prev, original = registration.call(
        _forward_op,
        dispatch.needs_grad(sample, model_output, uncond_output, noise),
        sample,
        *(t if t is None or t.dtype is dtype else t.to(dtype) for t in (model_output, uncond_output, noise)),
        noise_seed,
        *_tensor_or_value(alpha_t, sample),
        *_tensor_or_value(alpha_prev, sample),
        *_tensor_or_value(guidance_scale, sample),
        guidance_rescale,
        prediction_type,
        eta,
        clip_sample if dynamic_threshold is None else None,
        ratio,
        most,
        use_clipped_model_output,
        return_pred_original,
        impl,
    )
    return prev, original if return_pred_original else None


def _tensor_or_value(number: float | torch.Tensor, like: torch.Tensor) -> tuple[_Optional, float]:
    """A number as one of the two arguments the kernel's op has for it.

    Compiled code would be specialised on a float handed to an op, and compiled again at every timestep: there it
    becomes a tensor, by a product: that is where the compiler keeps a float variable.
    """
    if isinstance(number, torch.Tensor):
        return number, 1.0
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64, device=like.device) * number, 1.0
    return None, float(number)


def _forward(
    sample: torch.Tensor, model_output: torch.Tensor, uncond_output: _Optional, noise: _Optional, noise_seed: _Optional,
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    *step, wanted, impl = arguments
    kernels = registration.backend(impl, _OP)
    return kernels.forward(sample, model_output, uncond_output, noise, noise_seed, Step(*step), wanted)


def _fake_forward(sample: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(sample), torch.empty_like(sample) if arguments[-2] else sample.new_empty(0)


def _backward(
    grad_prev: _Optional, grad_original: _Optional, sample: _Optional, model_output: _Optional,
    uncond_output: _Optional, *arguments: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    *step, wanted, impl = arguments
    like = _first(sample, grad_prev, grad_original)
    clipped = (sample, model_output, uncond_output)
    kernels = registration.backend(impl, _OP)
    return kernels.backward(grad_prev, grad_original, like, clipped, Step(*step), tuple(wanted))


def _fake_backward(
    grad_prev: _Optional, grad_original: _Optional, sample: _Optional, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    like = _first(sample, grad_prev, grad_original)
    return tuple(torch.empty_like(like) if wanted else like.new_empty(0) for wanted in arguments[-2])


def _first(*tensors: _Optional) -> torch.Tensor:
    return next(t for t in tensors if t is not None)


_STEP_SCHEMA = (
    "Tensor? alpha_t, float alpha_t_value, Tensor? alpha_prev, float alpha_prev_value, Tensor? guidance,"
    " float guidance_value, float guidance_rescale, str prediction_type, float eta, float? clip_sample,"
    " float threshold_ratio, float threshold_max, bool use_clipped_model_output"
)
_forward_op = registration.define(
    "ddim_step(Tensor sample, Tensor model_output, Tensor? uncond_output, Tensor? noise, Tensor? noise_seed,"
    f" {_STEP_SCHEMA}, bool return_pred_original, str impl) -> (Tensor, Tensor)",
    kernel=_forward,
    fake=_fake_forward,
)
_backward_op = registration.define(
    "ddim_step_backward(Tensor? grad_prev, Tensor? grad_original, Tensor? sample, Tensor? model_output,"
    f" Tensor? uncond_output, {_STEP_SCHEMA}, bool[] wanted, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Only a clip makes the gradient depend on the inputs; without one nothing big is kept."""
    sample, model_output, uncond_output, _, _, alpha_t, a, alpha_prev, b, guidance, *rest, wanted, ctx.impl = inputs
    clipped = rest[4] is not None
    kept = (sample, model_output, uncond_output) if clipped else (None, None, None)
    ctx.save_for_backward(*kept, alpha_t, alpha_prev, guidance)
    ctx.values, ctx.rest, ctx.wanted = (a, b), rest, wanted
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_prev: _Optional, grad_original: _Optional) -> tuple[_Optional, ...]:
    *kept, alpha_t, alpha_prev, guidance = ctx.saved_tensors
    (a, b), wanted = ctx.values, list(ctx.needs_input_grad[:4])
    grad_original = grad_original if ctx.wanted else None
    arguments = (grad_prev, grad_original, *kept, alpha_t, a, alpha_prev, b, guidance, *ctx.rest, wanted, ctx.impl)
    grads = registration.call(_backward_op, torch.is_grad_enabled(), *arguments)
    found = [g if w else None for g, w in zip(grads, wanted, strict=True)]
    return (*found, *[None] * (len(ctx.needs_input_grad) - 4))


registration.differentiable(
    _forward_op, setup_context=_setup_context, backward=_differentiate, backward_op=_backward_op
)
dispatch.register(
    _OP,
    dispatch.Impl(
        "cpu", partial(_supports, registration.on_cpu), partial(_call_kernel, "cpu"), verified=frozenset({"x86_64"})
    ),
    dispatch.Impl(
        "triton",
        partial(_supports, registration.on_triton),
        partial(_call_kernel, "triton"),
        frozenset(),
        slower=registration.interpreted,
    ),
    dispatch.Impl("reference", lambda facts: None, _reference),
)
