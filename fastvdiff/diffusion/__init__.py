"""Schedules, noise, predictions, guidance, losses, and the schedulers that run on the fused step."""

from .guidance import classifier_free_guidance, frame_scales
from .losses import diffusion_loss, min_snr_weight, training_target
from .noise import correlate_frames, draw_noise, video_noise
from .prediction import add_noise, convert, to_original_and_epsilon, velocity
from .schedulers import DDIMScheduler, DDPMScheduler, StepOutput
from .schedules import cosine_betas, make_betas, rescale_zero_terminal_snr, signal_to_noise

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "StepOutput",
    "add_noise",
    "classifier_free_guidance",
    "convert",
    "correlate_frames",
    "cosine_betas",
    "diffusion_loss",
    "draw_noise",
    "frame_scales",
    "make_betas",
    "min_snr_weight",
    "rescale_zero_terminal_snr",
    "signal_to_noise",
    "to_original_and_epsilon",
    "training_target",
    "velocity",
    "video_noise",
]
