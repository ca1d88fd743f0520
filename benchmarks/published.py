"""Whole networks at the sizes they were published in, for a GPU: random weights, built on the device.

The configurations are those of the released checkpoints: Stable Video Diffusion (img2vid), AnimateDiff on Stable
Diffusion 1.5 (motion adapter 1.5-2), zeroscope v2 576w; and fastvdiff's own VideoUNet by its presets. A forward is a
sampling step's, of two samples for guidance; a training step takes one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import fastvdiff

Built = tuple[nn.Module, dict[str, Any]]
_WIDTHS = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
DIFFUSERS = "swap_kernels"  # what their results are filed under


@dataclass(frozen=True)
class Network:
    """A network and what is timed of it; `build(batch)` makes it in float32, with inputs, on torch's default device.

    `compile_mode` is torch.compile's, of the network in channels_last; None: that would take longer than all the rest.
    """

    op: str
    label: str
    build: Callable[[int], Built]
    batch: int
    training: bool
    compile_mode: str | None = None
    checkpointed: bool = False

    @property
    def name(self) -> str:
        """A readable test id."""
        return f"{self.label}-batch-{self.batch}-{'training' if self.training else 'forward'}"


def svd(batch: int) -> Built:
    """25 frames of 576x1024, after the autoencoder; the first frame's latents beside the noisy ones."""
    from diffusers import UNetSpatioTemporalConditionModel

    model = UNetSpatioTemporalConditionModel(
        **_WIDTHS, sample_size=96, in_channels=8, out_channels=4, num_frames=25, num_attention_heads=(5, 10, 20, 20),
        cross_attention_dim=1024, addition_time_embed_dim=256, projection_class_embeddings_input_dim=768,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(batch, 25, 8, 72, 128), "timestep": 500, "return_dict": False,
        "encoder_hidden_states": torch.randn(batch, 1, 1024), "added_time_ids": torch.ones(batch, 3),
    }  # fmt: skip


def animatediff(batch: int) -> Built:
    """16 frames of 512x512; each frame has its clip's text."""
    from diffusers import UNetMotionModel

    model = UNetMotionModel(
        **_WIDTHS, sample_size=64, cross_attention_dim=768, num_attention_heads=8, motion_num_attention_heads=8,
        motion_max_seq_length=32, use_motion_mid_block=True,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(batch, 4, 16, 64, 64), "timestep": 500, "return_dict": False,
        "encoder_hidden_states": torch.randn(batch, 77, 768).repeat_interleave(16, dim=0),
    }  # fmt: skip


def zeroscope(batch: int) -> Built:
    """24 frames of 320x576, ModelScope's network."""
    from diffusers import UNet3DConditionModel

    model = UNet3DConditionModel(**_WIDTHS, sample_size=32, cross_attention_dim=1024, attention_head_dim=64)
    return model, {
        "sample": torch.randn(batch, 4, 24, 40, 72), "timestep": 500, "return_dict": False,
        "encoder_hidden_states": torch.randn(batch, 77, 1024),
    }  # fmt: skip


def video_unet(preset: str, batch: int) -> Built:
    """16 frames of 64x64: pixels of the original video diffusion model, or latents of 512x512."""
    model = fastvdiff.VideoUNet.from_preset(preset)
    config = model.config
    inputs: dict[str, Any] = {"sample": torch.randn(batch, config.in_channels, 16, 64, 64), "timestep": 500}
    if config.cross_attention_dim is not None:
        inputs["encoder_hidden_states"] = torch.randn(batch, 77, config.cross_attention_dim)
    return model, inputs


def _both(op: str, label: str, build: Callable[[int], Built], batches: tuple[int, int], **named: Any) -> list[Network]:
    forward = Network(op, label, build, batches[0], False, named.pop("compile_mode", "default"))
    trained = Network(op, label, build, batches[1], True, named.pop("training_mode", None), **named)
    return [forward, trained]


NETWORKS = (
    *_both("VideoUNet", "VideoUNet-vdm-16x64x64", partial(video_unet, "vdm"), (4, 4), compile_mode="max-autotune",
           training_mode="max-autotune"),
    *_both("VideoUNet", "VideoUNet-latent-16x64x64", partial(video_unet, "latent"), (2, 1),
           compile_mode="max-autotune"),
    *_both(DIFFUSERS, "UNetMotionModel-16x64x64", animatediff, (2, 1)),
    *_both(DIFFUSERS, "UNet3DConditionModel-24x40x72", zeroscope, (2, 1)),
    # Without recomputation the activations of eager's training step alone are more than 80 GB.
    *_both(DIFFUSERS, "UNetSpatioTemporalConditionModel-25x72x128", svd, (2, 1), checkpointed=True),
)  # fmt: skip
