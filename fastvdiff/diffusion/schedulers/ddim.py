"""DDIM sampling (Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastvdiff.ops import ddim_step

from ..noise import Generators, draw_noise
from .base import Scheduler, StepOutput
from .config import registers_config


class DDIMScheduler(Scheduler):
    """DDIM with the constructor, configuration and results of `diffusers.DDIMScheduler`, one fused kernel a step.

    num_train_timesteps: steps of the schedule the model was trained with.
    beta_start, beta_end, beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2"; trained_betas wins over them.
    clip_sample, clip_sample_range: clamp x0 to +- the range.
    set_alpha_to_one: past the last step a = 1 (x0 itself); else the schedule's first a.
    steps_offset: added to "leading" timesteps (Stable Diffusion: 1).
    prediction_type: "epsilon", "sample" or "v_prediction".
    thresholding, dynamic_thresholding_ratio, sample_max_value: Imagen's dynamic threshold; wins over the clip.
    timestep_spacing: "leading", "trailing" or "linspace".
    rescale_betas_zero_snr: make the last a_t exactly 0 (wants v or sample prediction and trailing timesteps).
    """

    @registers_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
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

    def _previous_alphas(self, alphas: list[float], timesteps: Sequence[int]) -> list[float]:
        stride = len(alphas) // (self.num_inference_steps or len(alphas))
        final = 1.0 if self.config.set_alpha_to_one else alphas[0]
        return [final] * stride + alphas[:-stride]

    def adds_noise(self, timestep: int, eta: float = 0.0) -> bool:
        """Whether `step` takes noise: at every timestep if eta > 0."""
        return eta > 0

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        uncond_output: torch.Tensor | None = None,
        guidance_scale: float | torch.Tensor = 1.0,
        guidance_rescale: float = 0.0,
        noise_seed: torch.Tensor | None = None,
        impl: str | None = None,
    ) -> StepOutput | tuple[torch.Tensor, torch.Tensor | None]:
        """From x_t to the x of the next timestep.

        model_output, sample, variance_noise: (B, C, T, H, W), or any shape with the batch first. timestep: an int, or
        a tensor of one element or (B,) (see `Scheduler`). eta: 0 is DDIM, 1 as noisy as DDPM. With eta > 0 the noise
        is `variance_noise`, or drawn in the kernel from `noise_seed` (int64 (1,) on the device), or drawn by
        `generator` (one, or a list with one per sample) as diffusers draws it. uncond_output, guidance_scale,
        guidance_rescale: classifier-free guidance inside the same kernel, see `fastvdiff.ops.ddim_step`.

        Returns StepOutput(prev_sample, pred_original_sample), or a plain tuple with `return_dict=False`. Raises
        ValueError before `set_timesteps`, or with more than one source of noise.
        """
        if self.num_inference_steps is None:
            raise ValueError("DDIMScheduler.step: call set_timesteps(num_inference_steps) first")
        noise = variance_noise
        if eta > 0:
            if sum(source is not None for source in (variance_noise, generator, noise_seed)) > 1:
                raise ValueError(
                    "DDIMScheduler.step: expected one of variance_noise, generator and noise_seed, got more"
                )
            if variance_noise is None and noise_seed is None:
                noise = draw_noise(model_output.shape, generator, model_output.device, model_output.dtype)
        alpha_t, alpha_prev = self.alphas_at(timestep, sample.device)
        result = ddim_step(
            sample,
            model_output,
            alpha_t,
            alpha_prev,
            uncond_output=uncond_output,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            prediction_type=self.config.prediction_type,
            eta=eta,
            noise=noise if eta > 0 else None,
            noise_seed=noise_seed if eta > 0 else None,
            use_clipped_model_output=use_clipped_model_output,
            impl=impl,
            **self._limits(),
        )
        return StepOutput(*result) if return_dict else result
