"""Noise schedules: betas over the training steps, and what follows from them.

Notation as in DDIM: a_t is the cumulative product of 1 - beta, so x_t = sqrt(a_t) x0 + sqrt(1 - a_t) epsilon and the
signal-to-noise ratio is a_t / (1 - a_t).
"""

from __future__ import annotations

import math

import torch

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def make_betas(
    schedule: str, num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02, *, zero_terminal_snr: bool = False
) -> torch.Tensor:
    """The betas of a named schedule.

    `schedule`: "linear" (DDPM), "scaled_linear" (linear in sqrt(beta), Stable Diffusion) or "squaredcos_cap_v2" (the
    cosine schedule, which ignores `beta_start` and `beta_end`). Returns float32 (num_steps,).
    Raises ValueError for another name.
    """
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float32)
    elif schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float32) ** 2
    elif schedule == "squaredcos_cap_v2":
        betas = cosine_betas(num_steps)
    else:
        known = ", ".join(repr(name) for name in BETA_SCHEDULES)
        raise ValueError(f"make_betas: schedule: expected one of {known}, got {schedule!r}")
    return rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas


def cosine_betas(num_steps: int, max_beta: float = 0.999) -> torch.Tensor:
    """The cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17), float32 (num_steps,).

    a(t) = cos^2((t / T + 0.008) / 1.008 * pi / 2); each beta is at most `max_beta`, which keeps the last step finite.
    """

    def signal(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - signal((i + 1) / num_steps) / signal(i / num_steps), max_beta) for i in range(num_steps)]
    return torch.tensor(betas, dtype=torch.float32)


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas whose last a_t is exactly 0 (Lin et al. 2023, arXiv:2305.08891, algorithm 1).

    sqrt(a) is shifted so that it ends at 0 and scaled so that it starts where it did. A model with such a schedule
    predicts v or the sample: at the last step epsilon says nothing about x0.
    """
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    cumulative = root**2
    alphas = torch.cat([cumulative[:1], cumulative[1:] / cumulative[:-1]])
    return 1 - alphas


def signal_to_noise(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """a / (1 - a), elementwise."""
    return alphas_cumprod / (1 - alphas_cumprod)
