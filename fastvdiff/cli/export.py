"""`fastvdiff export`: averaged weights of a training run as a pipeline folder, in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .errors import refuse, refusing

if TYPE_CHECKING:
    from fastvdiff.sampling import TextToVideoPipeline
    from fastvdiff.training import AveragedModel


def export(checkpoint: Path, folder: Path) -> None:
    """Write `folder` from a checkpoint, or from the latest one of a run."""
    from fastvdiff.training import CheckpointError, load_average

    if folder.exists() and any(folder.iterdir()) and not (folder / "fastvdiff.json").is_file():
        refuse(f"{folder}: is not empty and holds no pipeline; give another folder")
    with refusing(CheckpointError):
        average = load_average(checkpoint)
    with refusing(OSError):
        export_average(average, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    typer.echo(f"{folder}: the averaged weights of step {average.step}, {size / 1e6:.1f} MB")


def export_average(average: AveragedModel, folder: Path) -> None:
    """Write a pipeline in float16 with what its prompts look like."""
    import torch

    grammar = _prompt_grammar(average.dataset) | {"examples": list(average.config.output.sample_prompts)}
    pipeline_of(average).save_pretrained(folder, dtype=torch.float16, prompts=grammar)


def pipeline_of(average: AveragedModel) -> TextToVideoPipeline:
    """A DDIM pipeline that samples what the model was trained on."""
    from fastvdiff.sampling import TextToVideoPipeline

    data = average.config.data
    return TextToVideoPipeline(
        average.unet,
        average.text_encoder,
        average.config.diffusion.scheduler(),
        num_frames=data.num_frames,
        height=data.height,
        width=data.width,
        fps=average.fps,
    )


def _prompt_grammar(dataset: dict[str, Any]) -> dict[str, Any]:
    """What the captions of a described data set are made of: for `fastvdiff data shapes`, templates and words.

    "held_out" lists the combinations of colour, shape and direction that no caption had.
    """
    from fastvdiff.data import shapes

    if dataset.get("kind") != "shapes":
        return {}
    return {
        "templates": list(shapes.CAPTIONS),
        "colour": list(shapes.COLOURS),
        "shape": list(shapes.SHAPES),
        "direction": list(shapes.DIRECTIONS),
        "held_out": dataset["held_out"],
    }
