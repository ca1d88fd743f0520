"""Whole networks: the video U-Net, its configuration and presets."""

from .config import VideoUNetConfig
from .presets import PRESETS
from .unet import VideoUNet, VideoUNetOutput

__all__ = ["PRESETS", "VideoUNet", "VideoUNetConfig", "VideoUNetOutput"]
