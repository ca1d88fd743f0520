"""`fastvdiff train`: a run from a configuration, with sheets of samples on the way and a pipeline at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .errors import refuse, refusing

if TYPE_CHECKING:
    import numpy as np

    from fastvdiff.training import AveragedModel, TrainConfig, Trainer

ASSETS = Path(__file__).resolve().parent.parent / "assets"
INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


def train(config_name: str, arguments: Sequence[str], resume_from: str | None) -> None:
    """Train to the end, or to Ctrl-C (exit code 130, everything saved)."""
    overrides = _overrides(arguments)

    from fastvdiff.data import VideoError
    from fastvdiff.training import CheckpointError, ConfigError, TrainConfig, Trainer, TrainingError

    from .export import export_average

    with refusing(ConfigError):
        config = TrainConfig.load(_config_path(config_name), overrides)
    with refusing(ValueError, OSError, VideoError):
        sheets = Path(config.folder) / "samples"
        trainer = Trainer(config, on_samples=lambda average: _write_sheet(average, sheets))
        if resume_from is not None:
            folder = trainer.resume(resume_from)
            typer.echo(f"resuming from {folder}" if folder else f"no checkpoint in {config.folder} yet: starting anew")
    _print_summary(config, trainer)
    with refusing(CheckpointError, TrainingError, VideoError):
        finished = trainer.fit()
    if not finished:
        raise typer.Exit(INTERRUPTED)
    folder = trainer.folder / "pipeline"
    export_average(trainer.averaged(), folder)
    typer.echo(f'{folder}: the trained pipeline; try fastvdiff sample "..." -o out.mp4 --checkpoint {folder}')


def _config_path(name: str) -> Path:
    """The TOML file of a path, or of a name in the package."""
    packaged = ASSETS / f"{name}.toml"
    return packaged if packaged.is_file() and not Path(name).exists() else Path(name)


def _overrides(arguments: Sequence[str]) -> list[str]:
    """`--a.b=c` and `--a.b c` as "a.b=c"."""
    overrides, rest = [], list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            refuse(f"{option}: unexpected argument; overrides have the form --section.key=value")
        if "=" not in option:
            if not rest or rest[0].startswith("--"):
                refuse(f"{option}: expected a value, as in {option}=value")
            option = f"{option}={rest.pop(0)}"
        overrides.append(option.removeprefix("--"))
    return overrides


def _print_summary(config: TrainConfig, trainer: Trainer) -> None:
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M" for name, module in trainer.modules.items()
    )
    data, run = config.data, config.run
    typer.echo(
        f"{len(trainer.dataset)} clips, {data.num_frames} frames of {data.width}x{data.height}; {sizes} parameters; "
        f"{run.steps} steps of {run.batch_size * run.accumulate} clips on {trainer.device} ({run.precision}); "
        f"run folder {trainer.folder}"
    )


def _write_sheet(average: AveragedModel, folder: Path) -> dict[str, np.ndarray]:
    """One PNG with the frames of a video for each of the run's sample prompts, at fixed seeds; the videos by prompt."""
    import numpy as np

    from fastvdiff.data import write_video
    from fastvdiff.sampling import to_uint8

    from .export import pipeline_of

    output = average.config.output
    frames = pipeline_of(average)(
        list(output.sample_prompts),
        num_inference_steps=output.sample_steps,
        guidance_scale=output.sample_guidance,
        seed=average.config.seed,
        progress=False,
    ).frames
    videos = to_uint8(np.stack(list(frames)))
    folder.mkdir(exist_ok=True)
    write_video(folder / f"step-{average.step:08d}.png", np.concatenate(videos), average.fps)
    return dict(zip(output.sample_prompts, videos, strict=True))
