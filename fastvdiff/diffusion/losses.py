"""The denoising loss: what the model should say, and how much each noise level counts."""

from __future__ import annotations

import torch

from .prediction import check_prediction_type, velocity
from .schedules import signal_to_noise


def training_target(
    prediction_type: str, original: torch.Tensor, noise: torch.Tensor, alpha: float | torch.Tensor
) -> torch.Tensor:
    """What the model should predict at sqrt(a) x0 + sqrt(1 - a) noise: the noise, x0, or v.

    original, noise (B, ...); alpha a float, 0-dim or (B,). Returns a tensor like `original`.
    """
    check_prediction_type("training_target", prediction_type)
    if prediction_type == "epsilon":
        return noise
    return original if prediction_type == "sample" else velocity(original, noise, alpha)


def min_snr_weight(prediction_type: str, alpha: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """The weight of each noise level that stops the easy ones from dominating (Hang et al. 2023, arXiv:2303.09556).

    min(SNR, gamma) over SNR for epsilon, over 1 for sample, over SNR + 1 for v. alpha: cumulative products (B,).
    Returns (B,); finite at SNR = 0 and SNR = infinity.
    """
    check_prediction_type("min_snr_weight", prediction_type)
    snr = signal_to_noise(alpha)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    capped = snr.clamp(max=gamma)
    return capped if prediction_type == "sample" else capped * (1 - alpha)


def diffusion_loss(
    model_output: torch.Tensor,
    original: torch.Tensor,
    noise: torch.Tensor,
    alpha: torch.Tensor,
    prediction_type: str = "epsilon",
    *,
    snr_gamma: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error against the training target, one value per sample, weighted by min-SNR if asked.

    model_output, original, noise: (B, ...). alpha: cumulative products at each sample's timestep, (B,). snr_gamma:
    min-SNR's gamma (the paper's is 5), or None for weight 1. mask: what counts, broadcastable to `original` (padded
    frames at 0); the mean is over what counts. Returns (B,) in float32 (float64 for float64).

    Equivalent to `((model_output - target) ** 2).flatten(1).mean(1) * weight`.
    """
    wide = torch.promote_types(original.dtype, torch.float32)
    target = training_target(prediction_type, original.to(wide), noise.to(wide), alpha)
    error = (model_output.to(wide) - target) ** 2
    if mask is None:
        loss = error.flatten(1).mean(1)
    else:
        counted = mask.to(wide).expand_as(error)
        loss = (error * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
    return loss if snr_gamma is None else loss * min_snr_weight(prediction_type, alpha.to(wide), snr_gamma)
