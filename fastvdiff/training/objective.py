"""One training step's random draws, each a function of (seed, step), and the denoising loss they give."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastvdiff.diffusion import add_noise, diffusion_loss, video_noise
from fastvdiff.models import VideoUNet
from fastvdiff.text import ByteTextEncoder

from .config import DiffusionConfig


class Draws(NamedTuple):
    """What a batch is noised with: timesteps int64 (B,), noise (B, C, T, H, W), dropped captions bool (B,) or None."""

    timesteps: torch.Tensor
    noise: torch.Tensor
    drop: torch.Tensor | None


def stream_seed(seed: int, purpose: str, step: int) -> int:
    """A 63-bit seed for one purpose in one step: streams of neighbouring steps have nothing in common."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Objective:
    """The denoising loss of a configuration: draw noise levels and noise, predict, compare, weight.

    config: see `DiffusionConfig`. seed: of the run. device: where the clips are.
    """

    def __init__(self, config: DiffusionConfig, seed: int, device: torch.device) -> None:
        self.config, self.seed, self.device = config, seed, device
        self.alphas = config.scheduler().alphas_cumprod.to(device)

    def draw(self, step: int, shape: Sequence[int]) -> Draws:
        """The draws of micro-step `step` for clips (B, C, T, H, W); drawn on the CPU, so alike on every device."""
        batch, levels, shift = shape[0], self.config.num_train_timesteps, self.config.timestep_shift
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "noise", step))
        # One level out of each of B equal strata: every batch covers the whole range of noise.
        strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        shifted = shift * strata / (1 + (shift - 1) * strata)
        timesteps = (shifted * levels).long().clamp(max=levels - 1)
        drop = torch.rand(batch, generator=generator) < self.config.unconditional
        noise = video_noise(shape, self.config.noise, generator=generator)
        return Draws(*(t.to(self.device, non_blocking=True) for t in (timesteps, noise, drop)))

    def loss(
        self,
        unet: VideoUNet,
        text_encoder: ByteTextEncoder,
        video: torch.Tensor,
        captions: list[str],
        draws: Draws,
        *,
        weighted: bool = True,
    ) -> torch.Tensor:
        """The loss of each clip, (B,), min-SNR weighted if configured; video (B, C, T, H, W) in [-1, 1], B captions."""
        alpha = self.alphas[draws.timesteps]
        text, mask = text_encoder(captions, drop=draws.drop)
        noisy = add_noise(video, draws.noise, alpha)
        output = unet(noisy, draws.timesteps, text, encoder_attention_mask=mask)
        config, target = self.config, (video, draws.noise, alpha, self.config.prediction_type)
        if not weighted:
            return diffusion_loss(output, *target)
        return diffusion_loss(output, *target, snr_gamma=config.snr_gamma, snr_floor=config.snr_floor)
