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


def min_snr_weight(prediction_type: str, alpha: torch.Tensor, gamma: float = 5.0, floor: float = 0.0) -> torch.Tensor:
    """The weight of each noise level that stops the easy ones from dominating (Hang et al. 2023, arXiv:2303.09556).

    min(SNR, gamma) over SNR for epsilon, over 1 for sample, over SNR + 1 for v. floor: the SNR counts as at least this
    much, so that near pure noise x0 keeps a weight (1 in Salimans and Ho 2022, arXiv:2202.00512, "truncated SNR").
    alpha: cumulative products (B,). Returns (B,); finite at SNR = 0 and SNR = infinity, but for epsilon with a floor,
    which raises ValueError, as does a floor above gamma.
    """
    check_prediction_type("min_snr_weight", prediction_type)
    snr = signal_to_noise(alpha)
    if not 0 <= floor <= gamma or (floor > 0 and prediction_type == "epsilon"):
        raise ValueError(
            f"min_snr_weight: floor: expected 0, or for sample and v_prediction up to gamma = {gamma:g}, got {floor:g} "
            f"for {prediction_type}"
        )
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    capped = snr.clamp(floor, gamma)
    return capped if prediction_type == "sample" else capped * (1 - alpha)


def diffusion_loss(
    model_output: torch.Tensor,
    original: torch.Tensor,
    noise: torch.Tensor,
    alpha: torch.Tensor,
    prediction_type: str = "epsilon",
    *,
    snr_gamma: float | None = None,
    snr_floor: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error against the training target, one value per sample, weighted by min-SNR if asked.

    model_output, original, noise: (B, ...). alpha: cumulative products at each sample's timestep, (B,). snr_gamma,
    snr_floor: of `min_snr_weight` (the paper's gamma is 5), or None for weight 1. mask: what counts, broadcastable to
    `original` (padded frames at 0); the mean is over what counts. Returns (B,) in float32 (float64 for float64).

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
    if snr_gamma is None:
        return loss
    return loss * min_snr_weight(prediction_type, alpha.to(wide), snr_gamma, snr_floor)
