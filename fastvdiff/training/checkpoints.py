"""Checkpoints: safetensors and JSON in a sealed folder, never a pickle; the newest are kept, none is trusted unread."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastvdiff.sealed import DamagedError, sealed_folder, verify_seal

PREFIX = "checkpoint-"
STATE = "state.json"
STATE_KEYS = ("step", "config", "data", "dataset", "fps")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: tensors by file stem ("unet", "optimizer", ...) and by name, and plain values."""

    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


def save(
    run: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write `run/checkpoint-<step>` aside, verify it, rename it, and only then remove older ones beyond `keep` in all.

    Raises CheckpointError where the disk refuses (it is full, say): what was there before is still there then.
    """
    folder = run / f"{PREFIX}{step:08d}"
    try:
        with sealed_folder(folder) as aside:
            for stem, group in tensors.items():
                plain = {name: tensor.detach().cpu().contiguous() for name, tensor in group.items()}
                save_file(plain, aside / f"{stem}.safetensors")
            text = json.dumps({"step": step, **state}, indent=1)
            (aside / STATE).write_text(text + "\n", encoding="utf-8")
    except (OSError, SafetensorError, DamagedError) as error:
        raise CheckpointError(f"{folder}: could not be written, earlier checkpoints are untouched: {error}") from error
    older = [other for other in found(run) if step_of(other) < step]
    for old in older[: len(older) - (keep - 1)] if keep <= len(older) else ():
        _remove(old)
    return folder


def _remove(folder: Path) -> None:
    """Delete a checkpoint, its name first: killed half-way, no half of it is left to be read. What cannot go stays."""
    gone = folder.with_name(f".{folder.name}.gone-{os.getpid()}")
    with contextlib.suppress(OSError):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def load(folder: Path) -> Checkpoint:
    """Verify a checkpoint's every file and read it onto the CPU. Raises CheckpointError naming what is wrong."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    try:
        entries = verify_seal(folder)
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        stems = [name.removesuffix(".safetensors") for name in entries if name.endswith(".safetensors")]
        tensors = {stem: load_file(folder / f"{stem}.safetensors") for stem in stems}
        missing = [key for key in STATE_KEYS if key not in state]
        if missing:
            raise DamagedError(f"{folder / STATE}: lacks {', '.join(missing)}: not a training checkpoint")
    except (DamagedError, OSError, SafetensorError, ValueError) as error:
        others = [other.name for other in found(folder.parent) if other != folder]
        advice = f"; older ones in {folder.parent}: {', '.join(others)}" if others else ""
        raise CheckpointError(f"damaged checkpoint: {error}{advice}") from error
    return Checkpoint(tensors, state)


def found(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; what an interrupted save left does not count."""
    pattern = re.compile(re.escape(PREFIX) + r"\d+")
    folders = [path for path in run.glob(f"{PREFIX}*") if path.is_dir() and pattern.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix(PREFIX))


def resolve(run: Path, wanted: str) -> Path | None:
    """The folder that `--resume_from_checkpoint` means: "latest" (None where there is none yet), a name or a path.

    Raises CheckpointError for a name or path that is not there.
    """
    if wanted == "latest":
        folders = found(run)
        return folders[-1] if folders else None
    for folder in (Path(wanted), run / wanted):
        if folder.is_dir():
            return folder
    known = ", ".join(folder.name for folder in found(run)) or "none"
    raise CheckpointError(f"{wanted}: no such checkpoint; in {run}: {known}")


def remove_leftovers(run: Path) -> None:
    """Clear away what killed saves left beside the checkpoints, and put back one that had stepped aside."""
    for path in run.glob(f".{PREFIX}*.old-*"):
        folder = run / path.name.removeprefix(".").partition(".")[0]
        if folder.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(folder)
    for kind in ("new", "gone"):
        for path in run.glob(f".{PREFIX}*.{kind}-*"):
            shutil.rmtree(path, ignore_errors=True)
