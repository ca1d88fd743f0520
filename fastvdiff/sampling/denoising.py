"""The denoising loop of one call: the same steps whether they run one by one or are recorded into a graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastvdiff.diffusion import DDIMScheduler, DDPMScheduler, draw_noise
from fastvdiff.models import VideoUNet

from . import arguments

# After step i: the samples and the text that the next step starts from.
AfterStep = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class LoopInputs(NamedTuple):
    """The tensors that a loop reads; B videos, 2B texts with guidance, the negative prompts' after the prompts'."""

    sample: torch.Tensor  # (B, C, T, H, W) float32, the noise to start from
    text: torch.Tensor  # (B or 2B, L, D)
    mask: torch.Tensor  # (B or 2B, L) bool
    scale: float | torch.Tensor | None  # of guidance: a float, or float32 () or (1, T); None without guidance
    noise: Iterable[torch.Tensor]  # one like `sample` for each step that adds noise, taken as the loop gets there


@dataclass(frozen=True)
class Denoiser:
    """A U-Net and a scheduler at the timesteps of one run.

    timesteps: Python ints, falling. What is looked up by them reaches the device as plain numbers, so that no step
    copies from the host or waits for the device. options: of every scheduler step, such as eta; rescale: of guidance.
    """

    unet: VideoUNet
    scheduler: DDIMScheduler | DDPMScheduler
    timesteps: Sequence[int]
    options: dict[str, Any]
    rescale: float

    @classmethod
    def of(
        cls, unet: VideoUNet, scheduler: DDIMScheduler | DDPMScheduler, steps: int, eta: float, rescale: float
    ) -> Denoiser:
        """The loop of `steps` steps, which the scheduler is set to; ValueError for an eta where it has none."""
        has_eta = "eta" in inspect.signature(scheduler.step).parameters
        if eta != 0.0 and not has_eta:
            arguments.fail("eta", f"0, as {type(scheduler).__name__} has no eta", eta)
        scheduler.set_timesteps(steps)
        return cls(unet, scheduler, scheduler.timesteps.tolist(), {"eta": eta} if has_eta else {}, rescale)

    def adds_noise(self, timestep: int) -> bool:
        """Whether the step at this timestep takes noise."""
        return self.scheduler.adds_noise(timestep, **self.options)

    def draws(self, sample: torch.Tensor, generators: Sequence[torch.Generator]) -> Iterator[torch.Tensor]:
        """The run's noise from each video's generator, drawn when it is asked for: every step's like `sample`."""
        for timestep in self.timesteps:
            if self.adds_noise(timestep):
                yield draw_noise(sample.shape, generators, sample.device, sample.dtype)

    def run(
        self, inputs: LoopInputs, timesteps: Iterable[int] | None = None, after_step: AfterStep | None = None
    ) -> torch.Tensor:
        """Denoise, at all timesteps or at those given, and return the samples (B, C, T, H, W) of the last step."""
        sample, text, noise = inputs.sample, inputs.text, iter(inputs.noise)
        for i, timestep in enumerate(self.timesteps if timesteps is None else timesteps):
            variance_noise = next(noise) if self.adds_noise(timestep) else None
            sample = self.step(timestep, sample, text, inputs.mask, inputs.scale, variance_noise)
            if after_step is not None:
                sample, text = after_step(i, sample, text)
        return sample

    def step(
        self,
        timestep: int,
        sample: torch.Tensor,
        text: torch.Tensor,
        mask: torch.Tensor,
        scale: float | torch.Tensor | None,
        noise: torch.Tensor | None,
    ) -> torch.Tensor:
        """One U-Net evaluation, with both halves of guidance in it, and one scheduler step."""
        options = dict(self.options, variance_noise=noise)
        scaled = self.scheduler.scale_model_input(sample, timestep).to(self.unet.dtype)
        batch = scaled if scale is None else torch.cat([scaled, scaled])
        output = self.unet(batch, timestep, text, encoder_attention_mask=mask).to(sample.dtype)
        if scale is not None:
            output, options["uncond_output"] = output.chunk(2)
            options |= {"guidance_scale": scale, "guidance_rescale": self.rescale}
        return self.scheduler.step(output, timestep, sample, **options).prev_sample
