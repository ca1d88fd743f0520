"""`fastvdiff swap`: what the kernels replace in a model of another library, checked and timed on this machine."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
import typer

from fastvdiff.swap import swap_kernels

from .errors import refuse
from .tables import table_console


def swap(model: str, config: Path | None, frames: int, size: int, verify: bool) -> None:
    """Build `model`, swap its kernels, verify them, and print what came of it."""
    cls = _class_of(model)
    options = _options(config)
    torch.manual_seed(0)
    try:
        network = cls.from_config(options) if hasattr(cls, "from_config") else cls(**options)
    except (TypeError, ValueError) as error:
        refuse(f"{model}: cannot be built from {config or 'its defaults'}: {error}")
    console = table_console()
    report = swap_kernels(network.eval())
    console.print(report)
    if not verify:
        return
    inputs = inputs_of(network, frames, size)
    if inputs is None:
        console.print(f"{cls.__name__}: what it takes is not known here; report.verify(*inputs) checks it in Python")
        return
    with console.status("running every replaced module both ways"):
        found = report.verify(**inputs)
    console.print(found)
    if not found.passed:
        raise typer.Exit(1)


def _class_of(name: str) -> type:
    """`package.module.Class`, or a class of diffusers by its name alone."""
    module, _, attribute = (name if "." in name else f"diffusers.{name}").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        refuse(f"--model {name}: {error}")
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        refuse(f"--model {name}: expected a torch.nn.Module class, and {module} has none of that name")
    return found


def _options(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    try:
        options = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        refuse(f"--config {config}: {error}")
    if not isinstance(options, dict):
        refuse(f"--config {config}: expected a JSON object of constructor arguments")
    return options


def inputs_of(network: Any, frames: int, size: int) -> dict[str, Any] | None:
    """Random inputs, by name, for one video of `frames` and `size`; None for a class that is not known."""
    name, config = type(network).__name__, getattr(network, "config", None)
    if name.startswith("AutoencoderKL") and config is not None:
        if name == "AutoencoderKLTemporalDecoder":
            return {"sample": torch.randn(frames, config.in_channels, size, size), "num_frames": frames}
        if not any(isinstance(layer, torch.nn.Conv3d) for layer in network.modules()):  # an autoencoder of images
            return {"sample": torch.randn(frames, config.in_channels, size, size)}
        return {"sample": torch.randn(1, config.in_channels, frames, size, size)}
    if name not in ("UNet3DConditionModel", "UNetMotionModel", "UNetSpatioTemporalConditionModel", "I2VGenXLUNet"):
        return None
    text = torch.randn(1, 77, config.cross_attention_dim)
    video = torch.randn(1, config.in_channels, frames, size, size)
    inputs = {"sample": video, "timestep": 500, "encoder_hidden_states": text}
    if name == "UNetMotionModel":
        inputs["encoder_hidden_states"] = text.repeat_interleave(frames, dim=0)
    elif name == "UNetSpatioTemporalConditionModel":
        count = config.projection_class_embeddings_input_dim // config.addition_time_embed_dim
        inputs |= {"sample": video.transpose(1, 2), "encoder_hidden_states": text[:, :1]}
        inputs["added_time_ids"] = torch.ones(1, count)
    elif name == "I2VGenXLUNet":
        inputs |= {"fps": torch.tensor([8]), "image_latents": torch.randn_like(video), "image_embeddings": text[:, 0]}
    return inputs
