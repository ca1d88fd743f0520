"""Schedulers with the diffusers interface: same constructor, config file and `step`, on the fused step of `ops`."""

from .base import Scheduler, StepOutput
from .ddim import DDIMScheduler
from .ddpm import DDPMScheduler

__all__ = ["DDIMScheduler", "DDPMScheduler", "Scheduler", "StepOutput"]
