"""`swap_scheduler`: diffusers' DDIM step as one kernel."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from fastvdiff import checks, ops

from . import classes
from .report import Entry, SwapReport
from .target import Target, kernel_runs

_OP = "swap_scheduler"
_TYPES = ("epsilon", "sample", "v_prediction")


def swap_scheduler(pipe: Any) -> SwapReport:
    """Put the fused DDIM step behind a diffusers pipeline's `DDIMScheduler`.

    The scheduler object, its configuration, timesteps and random numbers stay; `step` reads and writes each value once
    and does not wait for the device.

    Args:
        pipe: a pipeline with a `scheduler`, or the scheduler; changed in place.

    Returns:
        What was replaced, or why the scheduler was left alone; `undo()` takes it back.

    Raises:
        TypeError: `pipe` neither has a `scheduler` nor is one.
    """
    scheduler = getattr(pipe, "scheduler", pipe)
    if not callable(getattr(scheduler, "step", None)) or not hasattr(scheduler, "set_timesteps"):
        checks.fail(_OP, "pipe", "a diffusers pipeline or scheduler", checks.describe(pipe), TypeError)
    report = SwapReport(scheduler)
    name = type(scheduler).__name__
    reason = "swapped already" if classes.is_swapped(scheduler) else _DDIM.check(scheduler)
    if reason is None:
        classes.swap(scheduler, _DDIM, recompute=False, method="step")
        report.add("scheduler", scheduler, Entry("scheduler", name, _DDIM.what))
    else:
        report.refused.append(Entry("scheduler", name, reason))
    return report


def _check(scheduler: Any) -> str | None:
    if not any(base.__name__ == "DDIMScheduler" for base in type(scheduler).__mro__):
        return "not a DDIMScheduler, the one step that has a kernel"
    own = type(scheduler).step.__qualname__.partition(".")[0]
    if own != "DDIMScheduler":
        return f"{own} has a step of its own"
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in _TYPES:
        return f"prediction_type {prediction_type!r}, which is none of {', '.join(_TYPES)}"
    return None


def _step(
    scheduler: Any, eager: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, eta: float = 0.0,
    use_clipped_model_output: bool = False, generator: Any = None, variance_noise: torch.Tensor | None = None,
    return_dict: bool = True,
) -> Any:  # fmt: skip
    alike = model_output.dtype == sample.dtype and model_output.shape == sample.shape
    ready = scheduler.num_inference_steps is not None and not (variance_noise is not None and generator is not None)
    if not (alike and ready and sample.is_floating_point() and _kernel_runs(sample, model_output)):
        return eager(scheduler, model_output, timestep, sample, eta, use_clipped_model_output, generator,
                     variance_noise, return_dict)  # fmt: skip
    home = sys.modules[eager.__module__]
    config = scheduler.config
    alpha_t, alpha_prev = _alphas(scheduler, timestep, sample.device)
    if eta > 0 and variance_noise is None:
        variance_noise = home.randn_tensor(
            model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
        )
    previous, original = ops.ddim_step(
        sample, model_output, alpha_t, alpha_prev, prediction_type=config.prediction_type, eta=eta,
        noise=variance_noise if eta > 0 else None, use_clipped_model_output=use_clipped_model_output,
        dynamic_threshold=(config.dynamic_thresholding_ratio, config.sample_max_value) if config.thresholding else None,
        clip_sample=config.clip_sample_range if config.clip_sample and not config.thresholding else None,
    )  # fmt: skip
    if not return_dict:
        return previous, original
    return home.DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=original)


def _kernel_runs(sample: torch.Tensor, model_output: torch.Tensor) -> bool:
    return kernel_runs(
        "ddim_step", sample, model_output, dtypes=(model_output.dtype,), coefficients_need_grad=False, rescale=False,
        threshold=False,
    )  # fmt: skip


def _alphas(scheduler: Any, timestep: Any, device: torch.device) -> tuple[Any, Any]:
    """a_t and the a of the next timestep: numbers, or for a timestep on a device gathered there."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    schedule = (scheduler.alphas_cumprod, float(scheduler.final_alpha_cumprod), stride)
    if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
        here, before = _tables(*schedule, device)
        return here[timestep], before[timestep]
    alphas, previous = _numbers(*schedule)
    return alphas[int(timestep)], previous[int(timestep)]


@functools.lru_cache(maxsize=16)
def _numbers(alphas: torch.Tensor, final: float, stride: int) -> tuple[list[float], list[float]]:
    values = alphas.tolist()
    return values, [final] * stride + values[: len(values) - stride]


@functools.lru_cache(maxsize=16)
def _tables(alphas: torch.Tensor, final: float, stride: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    here, before = _numbers(alphas, final, stride)
    return tuple(torch.tensor(values, dtype=torch.float32, device=device) for values in (here, before))


_DDIM = Target(("DDIMScheduler",), "the whole step in one pass", _check, _step)
