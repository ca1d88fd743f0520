"""What `fastvdiff` can do: the subcommands' names, arguments and help; their work is in the files beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="fastvdiff",
    help="Video diffusion U-Nets on fused kernels: sample a video from a prompt, train a model, check the kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(help="Make data sets.", no_args_is_help=True)
app.add_typer(data, name="data")
evaluation = typer.Typer(help="Measure what a model samples.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")


def main() -> None:
    """Entry point of the `fastvdiff` script."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        from fastvdiff import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(help='What to show, such as "a red circle moving right".')],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to; .mp4, .gif or .png (a sheet of frames).")],
    negative_prompt: Annotated[str | None, typer.Option(help="What to lead away from.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.5,
    eta: Annotated[float, typer.Option(help="0: DDIM's deterministic path; 1: as much noise as DDPM.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the noise; drawn and printed if not given.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames; by default as the model was trained.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT or one number; by default as trained.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the file; by default as trained.")] = None,
    checkpoint: Annotated[str, typer.Option(help="A pipeline folder, or a name in the package.")] = "tiny",
    impl: Annotated[
        str | None, typer.Option(help="Only this implementation of the ops: reference, cpu, triton or cuda.")
    ] = None,
) -> None:
    """Make a video from a prompt."""
    from .sample import Request, sample

    sample(
        Request(prompt, output, negative_prompt, steps, guidance, eta, seed, num_frames, size, fps, checkpoint, impl)
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="A TOML file, or a name in the package, such as tiny.")],
    resume_from_checkpoint: Annotated[
        str | None, typer.Option("--resume_from_checkpoint", help='"latest", or a checkpoint\'s name or path.')
    ] = None,
) -> None:
    """Train a model as CONFIG says; any of its keys can be overridden, as in --optimizer.lr=3e-4."""
    from .train import train

    train(config, context.args, resume_from_checkpoint)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run's folder for its latest one.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the pipeline; replaced if it is one.")],
) -> None:
    """Make a pipeline in half precision from a training checkpoint's averaged weights."""
    from .export import export

    export(checkpoint, folder)


@data.command()
def shapes(
    folder: Annotated[Path, typer.Argument(help="Where to write; made if it does not exist.")],
    clips: Annotated[int, typer.Option(help="How many clips.")] = 4000,
    frames: Annotated[int, typer.Option(help="Frames of each clip.")] = 16,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 32,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 8.0,
    seed: Annotated[int, typer.Option(help="Clip k of a seed is always the same.")] = 0,
    held_out: Annotated[
        float, typer.Option(help="Share of (colour, shape, direction) combinations that no clip shows.")
    ] = 0.0,
    background: Annotated[
        list[str] | None,
        typer.Option(help="solid, gradient, checker, noise (by default these four) or plain; may be repeated."),
    ] = None,
) -> None:
    """Write captioned clips of coloured shapes that move."""
    from .shapes import shapes

    shapes(folder, clips, frames, size, fps, seed, held_out, background or [])


@evaluation.command(name="shapes")
def eval_shapes(
    checkpoint: Annotated[str, typer.Option(help="A pipeline folder, or a name in the package.")] = "tiny",
    prompts: Annotated[int, typer.Option(help="How many videos.")] = 64,
    seen: Annotated[
        bool, typer.Option("--seen", help="Combinations that training showed, not those held out.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.5,
    seed: Annotated[int, typer.Option(help="Of the first video's noise; the next one's is one more.")] = 0,
    sheet: Annotated[Path | None, typer.Option(help="A .png with frames of every video.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="A .json with every reading.")] = None,
    impl: Annotated[
        str | None, typer.Option(help="Only this implementation of the ops: reference, cpu, triton or cuda.")
    ] = None,
) -> None:
    """Sample moving shapes and read colour, shape and direction off the pixels: how often is the prompt followed?"""
    from .eval_shapes import Request, eval_shapes

    eval_shapes(Request(checkpoint, prompts, seen, steps, guidance, seed, sheet, json_file, impl))


@app.command()
def doctor() -> None:
    """Show versions, devices, and which implementation each op would use here."""
    from .doctor import doctor

    doctor()


@app.command()
def verify() -> None:
    """Check every kernel's accuracy and speed on this machine, and remember what passed."""
    from .verify import verify

    verify()


@app.command()
def tune(
    level: Annotated[
        list[str] | None, typer.Option(help="svd-l0 to l3, animatediff-l0 to l3, vdm-l0, l1 or l3; all by default.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    training: Annotated[bool, typer.Option(help="Tune the backward kernels too.")] = True,
) -> None:
    """Find the fastest launch configurations of the Triton kernels on this GPU, and remember them."""
    from .tune import tune

    tune(level or [], op or [], training)


@app.command()
def swap(
    model: Annotated[
        str,
        typer.Option("--model", help="A class of diffusers, such as UNetMotionModel, or package.module.Class."),
    ],
    config: Annotated[
        Path | None, typer.Option("--config", help="A JSON file of its constructor's arguments; by default its own.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of the video it is tried on.")] = 16,
    size: Annotated[int, typer.Option(help="Height and width of what the model takes.")] = 32,
    verify: Annotated[bool, typer.Option(help="Check every replaced module against float64, and time it.")] = True,
) -> None:
    """Show what the kernels replace in a model of another library, with accuracy, times and memory."""
    from .swap import swap

    swap(model, config, frames, size, verify)
