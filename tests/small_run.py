"""The smallest data set, model and configuration that go through every part of training and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastvdiff.data import write_shapes
from fastvdiff.diffusion import DDIMScheduler
from fastvdiff.models import VideoUNet
from fastvdiff.sampling import TextToVideoPipeline
from fastvdiff.text import ByteTextEncoder, ByteTextEncoderConfig
from fastvdiff.training import TrainConfig

FRAMES, SIZE = 4, 8
MODEL_CHANGES: dict[str, Any] = {
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "temporal_attention_levels": [0, 1],
    "spatial_attention_levels": [1],
    "cross_attention_levels": [1],
    "cross_attention_dim": 16,
    "head_dim": 8,
    "norm_groups": 4,
}


def write_clips(folder: Path, clips: int = 10) -> Path:
    """A shapes data set of tiny clips."""
    write_shapes(folder, clips=clips, num_frames=FRAMES, size=SIZE)
    return folder


def write_config(path: Path, clips: Path, run: Path, **run_values: Any) -> Path:
    """A TOML file for a run of a few steps."""
    changes = "\n".join(f"{name} = {value}" for name, value in MODEL_CHANGES.items())
    values = "\n".join(f"{name} = {value}" for name, value in {"steps": 4, "batch_size": 2, **run_values}.items())
    path.write_text(
        f"""
folder = "{run}"
[data]
folder = "{clips}"
num_frames = {FRAMES}
height = {SIZE}
width = {SIZE}
[model.changes]
{changes}
[text]
depth = 1
heads = 2
[optimizer]
warmup_steps = 1
[run]
{values}
[output]
log_every = 2
checkpoint_every = 2
sample_every = 0
sample_steps = 2
"""
    )
    return path


def small_config(tmp_path: Path, clips: Path, run: str = "run", *overrides: str) -> TrainConfig:
    """The configuration of `write_config`, with overrides."""
    return TrainConfig.load(write_config(tmp_path / "small.toml", clips, tmp_path / run), overrides)


def small_pipeline(seed: int = 0, **scheduler: Any) -> TextToVideoPipeline:
    """A pipeline of a small network whose output is not the zero that a fresh one gives."""
    torch.manual_seed(seed)
    unet = VideoUNet.from_preset("tiny", **MODEL_CHANGES).eval()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    text = ByteTextEncoder(ByteTextEncoderConfig(width=16, depth=1, heads=2)).eval()
    for name, parameter in [*unet.named_parameters(), *text.named_parameters()]:
        if parameter.count_nonzero() == 0 or "null_embedding" in name or "token_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    arguments = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", **scheduler}
    return TextToVideoPipeline(
        unet, text, DDIMScheduler(timestep_spacing="trailing", **arguments),
        num_frames=FRAMES, height=SIZE, width=SIZE, fps=8.0,
    )  # fmt: skip
