"""A pipeline as a folder: a part to a sub-folder, `fastvdiff.json` for what they share, a seal over all of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from fastvdiff import __version__
from fastvdiff.diffusion import DDIMScheduler, DDPMScheduler
from fastvdiff.models import VideoUNet
from fastvdiff.sealed import sealed_folder, verify_seal
from fastvdiff.text import ByteTextEncoder, ByteTextEncoderConfig

if TYPE_CHECKING:
    from .text_to_video import TextToVideoPipeline

DESCRIPTION = "fastvdiff.json"
FORMAT = 1
ASSETS = Path(__file__).resolve().parent.parent / "assets"
SIZES = ("num_frames", "height", "width", "fps")
SCHEDULERS = {cls.__name__: cls for cls in (DDIMScheduler, DDPMScheduler)}


def packaged() -> list[str]:
    """Names of the pipelines that come with the package."""
    return sorted(file.parent.name for file in ASSETS.glob(f"*/{DESCRIPTION}"))


def find(name: str | Path) -> Path:
    """The folder of a path or a packaged name; FileNotFoundError says which names there are."""
    path = Path(name)
    if path.is_dir():
        return path
    if str(name) in packaged():
        return ASSETS / str(name)
    known = ", ".join(map(repr, packaged())) or "none"
    raise FileNotFoundError(f"{name}: no such checkpoint folder; in the package: {known}")


def prompts_of(name: str | Path) -> dict[str, Any]:
    """What a pipeline's prompts look like, as its `save_pretrained` was told; {} where it was told nothing.

    name: a folder or a packaged name. Raises FileNotFoundError and ValueError as `find` and `load` do.
    """
    return _described(find(name))["prompts"]


def save(pipeline: TextToVideoPipeline, path: Path, dtype: torch.dtype | None, prompts: dict[str, Any]) -> None:
    """See `TextToVideoPipeline.save_pretrained`."""
    description = {
        "format": FORMAT,
        "version": __version__,
        **{name: getattr(pipeline, name) for name in SIZES},
        "scheduler": type(pipeline.scheduler).__name__,
        "prompts": prompts,
    }
    with sealed_folder(path) as aside:
        for name in ("unet", "text_encoder"):
            module = copy.deepcopy(getattr(pipeline, name)).to("cpu", dtype)
            module.save_pretrained(aside / name)
            (aside / name / "README.md").unlink(missing_ok=True)  # the hub's empty model card
        pipeline.scheduler.save_pretrained(aside / "scheduler")
        (aside / DESCRIPTION).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """The arguments of a `TextToVideoPipeline`, its parts on the CPU; see `from_pretrained` for the errors."""
    description = _described(path)
    scheduler = SCHEDULERS[description["scheduler"]]
    return {
        "unet": VideoUNet.from_pretrained(str(path / "unet")),
        "text_encoder": _text_encoder(path / "text_encoder"),
        "scheduler": scheduler.from_pretrained(path, subfolder="scheduler"),
        **{name: description[name] for name in SIZES},
    }


def _described(path: Path) -> dict[str, Any]:
    """The description of a folder whose files are all whole."""
    if not (path / DESCRIPTION).is_file():
        raise ValueError(f"{path}: holds no {DESCRIPTION}: not a fastvdiff pipeline (`fastvdiff export` makes one)")
    verify_seal(path)
    description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    if description["format"] != FORMAT:
        raise ValueError(
            f"{path / DESCRIPTION}: format {description['format']}, this fastvdiff {__version__} reads {FORMAT}"
        )
    return description


def _text_encoder(path: Path) -> ByteTextEncoder:
    """What the encoder's `save_pretrained` wrote; the hub's own reader would print to the screen."""
    encoder = ByteTextEncoder(ByteTextEncoderConfig(**json.loads((path / "config.json").read_text(encoding="utf-8"))))
    encoder.load_state_dict(load_file(path / "model.safetensors"))
    return encoder.eval()
