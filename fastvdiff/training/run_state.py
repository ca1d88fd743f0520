"""What a checkpoint holds: everything that a run's next step depends on, collected and put back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvdiff import __version__

from . import checkpoints, clips, random_states
from .checkpoints import Checkpoint, CheckpointError
from .config import TrainConfig, differing_keys
from .optimizer import learning_rate
from .schema import ConfigError, from_table
from .weights import load_weights, weights_of

if TYPE_CHECKING:
    from .trainer import Trainer


def collect(trainer: Trainer) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """The tensors of a checkpoint, by file, and its plain values.

    Batches, noise and rates are functions of the configuration and the step; where the data and the rate stand is
    written down all the same, for people and for other tools.
    """
    config = trainer.config
    tensors = {name: weights_of(module) for name, module in trainer.modules.items()}
    tensors |= {f"ema_{name}": weights_of(module) for name, module in trainer.average.modules.items()}
    tensors["optimizer"] = trainer.optimizer.state_tensors()
    tensors["random"], random_values = random_states.capture()
    micro_step = trainer.step * config.run.accumulate
    batches = trainer.schedule.batches_per_epoch
    table = config.to_dict()
    return tensors, {
        "version": __version__,
        "config": table,
        "config_hash": hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest(),
        "data": trainer.data_hash,
        "data_bytes": trainer.data_bytes,
        "dataset": clips.description(trainer.dataset),
        "fps": trainer.fps,
        "position": {"epoch": micro_step // batches, "batch": micro_step % batches},
        "lr": learning_rate(config.optimizer, trainer.step, config.run.steps),
        "scaler": trainer.precision.state(),
        "random": random_values,
    }


def restore(trainer: Trainer, folder: Path, checkpoint: Checkpoint) -> None:
    """Put a checkpoint of `folder` back into a trainer of the same configuration.

    Raises CheckpointError where it is of another run or does not fit.
    """
    state, tensors = checkpoint.state, checkpoint.tensors
    _require_same_run(trainer, folder, state)
    try:
        for name, module in trainer.modules.items():
            load_weights(module, tensors[name], f"{name}.safetensors")
            load_weights(trainer.average.modules[name], tensors[f"ema_{name}"], f"ema_{name}.safetensors")
        trainer.optimizer.load_state_tensors(tensors["optimizer"])
        trainer.precision.load_state(state.get("scaler", {}))
        if "random" in tensors:
            random_states.restore(tensors["random"], state["random"])
        trainer.step = int(state["step"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint of this configuration: {error}") from error


def _require_same_run(trainer: Trainer, folder: Path, state: dict[str, Any]) -> None:
    config = trainer.config
    try:
        theirs = from_table(TrainConfig, state["config"], str(folder / checkpoints.STATE))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: written by another version: {error}") from error
    different = differing_keys(theirs, config, ("model", "text", "diffusion"))
    different += ["seed"] if theirs.seed != config.seed else []
    different += ["the clips held out (validation)"] if _held_out(theirs) != _held_out(config) else []
    if different:
        raise CheckpointError(f"{folder}: of another run: {', '.join(different)} differ from this configuration")
    if state["data"] != trainer.data_hash:
        raise CheckpointError(f"{folder}: of another run: clips or captions in {config.data.folder} changed")
    size, before = trainer.data_bytes, state.get("data_bytes")
    if before not in (None, size):
        raise CheckpointError(
            f"{folder}: of another run: the clips in {config.data.folder} had {before:,} bytes, they have {size:,} now"
        )
    changed = differing_keys(theirs, config, ("run", "data", "optimizer", "validation"))
    if changed:
        trainer.say(f"resuming with other values than before for {', '.join(changed)}")


def _held_out(config: TrainConfig) -> int:
    return config.validation.clips if config.validation.holds_out else 0
