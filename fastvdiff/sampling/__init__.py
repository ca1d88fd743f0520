"""Sampling: pipelines from prompts to videos."""

from .folder import prompts_of
from .frames import to_frames, to_uint8
from .text_to_video import DEFAULT_GUIDANCE, DEFAULT_STEPS, TextToVideoPipeline, VideoOutput

__all__ = [
    "DEFAULT_GUIDANCE",
    "DEFAULT_STEPS",
    "TextToVideoPipeline",
    "VideoOutput",
    "prompts_of",
    "to_frames",
    "to_uint8",
]
