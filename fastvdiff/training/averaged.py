"""What training is for: the averaged modules, in memory or out of a checkpoint, and what they were trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvdiff.models import VideoUNet
from fastvdiff.text import ByteTextEncoder

from . import checkpoints
from .checkpoints import STATE, CheckpointError
from .config import TrainConfig
from .schema import from_table
from .weights import load_weights


@dataclass(frozen=True)
class AveragedModel:
    """Averaged modules in eval mode, of a run at `step`; fps and the data set's own description, of its clips."""

    config: TrainConfig
    step: int
    fps: float
    dataset: dict[str, Any]
    unet: VideoUNet
    text_encoder: ByteTextEncoder


def load_average(folder: str | Path) -> AveragedModel:
    """The averaged modules of a checkpoint folder, or of the latest checkpoint in a run's folder, on the CPU.

    Every file is held to its hash first. Raises CheckpointError naming what is missing, damaged or does not fit.
    """
    folder = Path(folder)
    if not (folder / STATE).is_file():
        folder = checkpoints.resolve(folder, "latest") or folder
    checkpoint = checkpoints.load(folder)
    try:
        config = from_table(TrainConfig, checkpoint.state["config"], f"{folder / STATE}")
        unet = VideoUNet(config.model.resolved())
        text_encoder = ByteTextEncoder(config.text.resolved(unet.config.cross_attention_dim))
        for name, module in (("unet", unet), ("text_encoder", text_encoder)):
            load_weights(module, checkpoint.tensors[f"ema_{name}"], f"ema_{name}.safetensors")
            module.eval().requires_grad_(False)
        values = (checkpoint.state[name] for name in ("step", "fps", "dataset"))
        return AveragedModel(config, *values, unet, text_encoder)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint that this version wrote: {error}") from error
