"""DDPM ancestral sampling (Ho et al. 2020, arXiv:2006.11239)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from fastvdiff.ops import ddim_step
from fastvdiff.reference.ddim_step import alpha_column, threshold

from ..guidance import classifier_free_guidance
from ..noise import Generators, draw_noise
from ..prediction import to_original_and_epsilon
from .base import Scheduler, StepOutput
from .config import registers_config

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
_POSTERIOR = ("fixed_small", "fixed_small_log")  # two spellings of the posterior's own variance


class DDPMScheduler(Scheduler):
    """DDPM with the constructor, configuration and results of `diffusers.DDPMScheduler`.

    With the posterior's own variance ("fixed_small", the default, and "fixed_small_log") a step is exactly the DDIM
    step with eta = 1 and epsilon derived from the clipped x0, whatever the distance to the next timestep, so it runs
    on the fused kernel. The other variance types have no such form (their noise does not vanish with a = 1) and run
    the posterior's equation (7) as plain torch.

    variance_type: "fixed_small(_log)", "fixed_large(_log)" (beta_t), "learned" (the model's second half of channels is
    the variance) or "learned_range" (between the two fixed ones, in the logarithm). diffusers takes the root of a
    logarithm for "fixed_large_log", which is NaN; here it is what the name says, the same as "fixed_large".
    The other arguments are those of `DDIMScheduler`; past the last step a = 1.
    """

    @registers_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if variance_type not in VARIANCE_TYPES:
            known = ", ".join(map(repr, VARIANCE_TYPES))
            raise ValueError(f"DDPMScheduler: variance_type: expected one of {known}, got {variance_type!r}")
        super().__init__(
            num_train_timesteps,
            beta_start,
            beta_end,
            beta_schedule,
            trained_betas,
            prediction_type,
            timestep_spacing,
            rescale_betas_zero_snr,
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose a run's timesteps by their number, or give them: falling integers below num_train_timesteps."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("DDPMScheduler.set_timesteps: expected either num_inference_steps or timesteps")
        if timesteps is None:
            super().set_timesteps(num_inference_steps, device)
            return
        steps = [int(t) for t in timesteps]
        falling = all(a > b for a, b in itertools.pairwise(steps))
        if not steps or not falling or steps[0] >= len(self) or steps[-1] < 0:
            raise ValueError(
                f"DDPMScheduler.set_timesteps: timesteps: expected falling integers from {len(self) - 1} to 0, "
                f"got {steps}"
            )
        self.num_inference_steps = len(steps)
        self._visit(steps, device)

    def _previous_alphas(self, alphas: list[float], timesteps: Sequence[int]) -> list[float]:
        previous = [float("nan")] * len(alphas)
        for here, after in itertools.pairwise(timesteps):
            previous[here] = alphas[after]
        previous[timesteps[-1]] = 1.0
        return previous

    def adds_noise(self, timestep: int) -> bool:
        """Whether `step` takes noise at this host timestep: at all but 0."""
        return timestep > 0

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        variance_noise: torch.Tensor | None = None,
        uncond_output: torch.Tensor | None = None,
        guidance_scale: float | torch.Tensor = 1.0,
        guidance_rescale: float = 0.0,
        noise_seed: torch.Tensor | None = None,
        impl: str | None = None,
    ) -> StepOutput | tuple[torch.Tensor, torch.Tensor | None]:
        """From x_t to the x of the next timestep.

        Arguments, results and errors as in `DDIMScheduler.step`; with a learned variance the model's outputs have twice
        the sample's channels. `noise_seed` needs "fixed_small" (the fused step). No noise is added, or drawn, at a
        host timestep of 0; at one on the device it is drawn and counts for nothing.
        """
        variance_type = self.config.variance_type
        if sum(source is not None for source in (variance_noise, generator, noise_seed)) > 1:
            raise ValueError("DDPMScheduler.step: expected one of variance_noise, generator and noise_seed, got more")
        if noise_seed is not None and variance_type not in _POSTERIOR:
            raise ValueError(
                f"DDPMScheduler.step: noise_seed: expected variance_type 'fixed_small', got {variance_type!r}"
            )
        alpha_t, alpha_prev = self.alphas_at(timestep, sample.device)
        last = isinstance(alpha_t, float) and not self.adds_noise(int(timestep))
        noise = variance_noise
        if noise is None and noise_seed is None and not last:
            noise = draw_noise(sample.shape, generator, sample.device, model_output.dtype)
        if variance_type in _POSTERIOR:
            result = ddim_step(
                sample,
                model_output,
                alpha_t,
                alpha_prev,
                uncond_output=uncond_output,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                prediction_type=self.config.prediction_type,
                eta=0.0 if last else 1.0,
                noise=None if last else noise,
                noise_seed=None if last else noise_seed,
                use_clipped_model_output=True,
                impl=impl,
                **self._limits(),
            )
        else:
            spread = None
            if variance_type.startswith("learned"):
                model_output, spread = _split_channels("model_output", model_output, sample)
                if uncond_output is not None:
                    uncond_output, _ = _split_channels("uncond_output", uncond_output, sample)
            if uncond_output is not None:
                model_output = classifier_free_guidance(model_output, uncond_output, guidance_scale, guidance_rescale)
            prev, original = self._posterior_mean(model_output, sample, alpha_t, alpha_prev)
            if not last:
                prev = prev + self._deviation(alpha_t, alpha_prev, timestep, sample, spread) * noise
            result = (prev, original)
        return StepOutput(*result) if return_dict else result

    def _posterior_mean(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        alpha_t: float | torch.Tensor,
        alpha_prev: float | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Equation (7)'s mean, and the x0 in it after thresholding or clipping."""
        original, _ = to_original_and_epsilon(self.config.prediction_type, sample, model_output, alpha_t)
        limits = self._limits()
        if "dynamic_threshold" in limits:
            original = threshold(original, *limits["dynamic_threshold"])
        elif limits["clip_sample"] is not None:
            original = original.clamp(-limits["clip_sample"], limits["clip_sample"])
        at, ap = alpha_column(alpha_t, sample.dim()), alpha_column(alpha_prev, sample.dim())
        of_original = ap.sqrt() * (1 - at / ap) / (1 - at)
        of_sample = (at / ap).sqrt() * (1 - ap) / (1 - at)
        return of_original.to(sample.dtype) * original + of_sample.to(sample.dtype) * sample, original

    def _deviation(
        self,
        alpha_t: float | torch.Tensor,
        alpha_prev: float | torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        predicted: torch.Tensor | None,
    ) -> torch.Tensor:
        """The noise's standard deviation: 0-dim, (B, 1, ...) or the sample's shape; 0 at timestep 0."""
        at, ap = alpha_column(alpha_t, sample.dim()), alpha_column(alpha_prev, sample.dim())
        beta = 1 - at / ap
        if self.config.variance_type == "learned":
            deviation = predicted.sqrt()
        elif self.config.variance_type == "learned_range":
            small = ((1 - ap) / (1 - at) * beta).clamp(min=1e-20)
            part = (predicted + 1) / 2
            deviation = torch.exp((part * beta.log().to(sample.dtype) + (1 - part) * small.log().to(sample.dtype)) / 2)
        else:
            deviation = beta.sqrt().to(sample.dtype)
        if isinstance(alpha_t, float):
            return deviation
        moving = (timestep.to(sample.device).reshape(alpha_t.shape) > 0).to(sample.dtype)
        return deviation * moving.reshape(moving.shape + (1,) * (sample.dim() - 1) if moving.dim() else ())


def _split_channels(name: str, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction and the variance that a model with a learned variance returns in one tensor."""
    channels = sample.shape[1]
    if output.shape[1] != 2 * channels:
        raise ValueError(
            f"DDPMScheduler.step: {name}: expected {2 * channels} channels, a prediction and its variance, "
            f"got {output.shape[1]}"
        )
    return output.split(channels, dim=1)
