"""Classifier-free guidance as a function of its own; a scheduler's step takes it fused (`uncond_output=`)."""

from __future__ import annotations

import torch

from fastvdiff.reference.ddim_step import guide


def classifier_free_guidance(
    output: torch.Tensor,
    uncond_output: torch.Tensor,
    scale: float | torch.Tensor,
    rescale: float = 0.0,
) -> torch.Tensor:
    """Push the conditional output away from the unconditional one: u + w (c - u).

    output, uncond_output: (B, C, *spatial). scale: w, a float or one value per sample and frame, (B, 1), (1, T) or
    (B, T) for a (B, C, T, H, W) output (video models raise it along the clip). rescale: phi in [0, 1]; brings the
    standard deviation of each sample back toward the conditional one's and mixes: 0.7 is the paper's value.
    Returns a tensor like `output`. arXiv:2207.12598, eq. 6; the rescale is arXiv:2305.08891, section 3.4.
    """
    return guide(output, uncond_output, scale, rescale)


def frame_scales(start: float, end: float, num_frames: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Guidance that grows linearly from the first frame to the last: (1, num_frames) float32.

    Image-to-video models use it (1 to 3 over 25 frames in Stable Video Diffusion): the first frame is known, the last
    needs the most help.
    """
    return torch.linspace(start, end, num_frames, device=device)[None]
