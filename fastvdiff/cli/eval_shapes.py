"""`fastvdiff eval shapes`: how often a model shows the colour, shape and direction that its prompt names."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .errors import refuse, refusing

if TYPE_CHECKING:
    import numpy as np

    from fastvdiff.data.shapes import Combination
    from fastvdiff.metrics import ShapeReading

ATTRIBUTES = ("colour", "shape", "direction")
BATCH = 16  # videos sampled at a time; the noise of each depends on its seed alone
# On the sheet: columns of videos, frames shown of each, height of a frame and of the line below it, in pixels.
COLUMNS, SHOWN, FRAME_SIDE, LINE = 4, 6, 64, 16


@dataclass(frozen=True)
class Request:
    """The command's arguments, as typed."""

    checkpoint: str
    prompts: int
    seen: bool
    steps: int
    guidance: float
    seed: int
    sheet: Path | None
    json_file: Path | None
    impl: str | None


@dataclass(frozen=True)
class Outcome:
    """One video: what its prompt names, its seed, some of its frames, uint8 (n, H, W, 3), and what it shows."""

    prompt: str
    combination: Combination
    seed: int
    frames: np.ndarray
    reading: ShapeReading

    def right(self, attribute: str) -> bool:
        """Whether the video shows what its prompt names."""
        return getattr(self.reading, attribute) == dict(zip(ATTRIBUTES, self.combination, strict=True))[attribute]


def eval_shapes(request: Request) -> None:
    """Sample, read, report; what can be refused is refused before anything is sampled."""
    _check(request)

    from fastvdiff.sampling import prompts_of

    with refusing(FileNotFoundError, ValueError):
        grammar = prompts_of(request.checkpoint)
    if "shape" not in grammar:
        refuse(f"--checkpoint: {request.checkpoint} was not trained on `fastvdiff data shapes`")
    held_out = frozenset(map(tuple, grammar.get("held_out", ())))
    if not held_out:
        typer.echo("Note: training saw every combination of colour, shape and direction: none was held out.", err=True)
    kind = "held out of training" if held_out and not request.seen else "seen in training"
    outcomes = _sampled(request, choose_prompts(held_out, request.prompts, seen=request.seen or not held_out))
    report = _report(request, kind, outcomes)
    _print_table(kind, report)
    with refusing(OSError):
        if request.json_file is not None:
            request.json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if request.sheet is not None:
            draw_sheet(outcomes, request.sheet)


def _check(request: Request) -> None:
    """Refuse what is wrong whatever the checkpoint is."""
    for option, count in (("--prompts", request.prompts), ("--steps", request.steps)):
        if count < 1:
            refuse(f"{option}: expected at least 1, got {count}")
    if not 0 <= request.guidance < float("inf"):
        refuse(f"--guidance: expected a number from 0 upward, got {request.guidance:g}")
    if request.seed < 0:
        refuse(f"--seed: expected at least 0, got {request.seed}")
    for option, path, suffix in (("--sheet", request.sheet, ".png"), ("--json", request.json_file, ".json")):
        if path is None:
            continue
        if path.suffix.lower() != suffix:
            refuse(f"{option}: expected a name ending in {suffix}, got {str(path)!r}")
        if not path.parent.is_dir():
            refuse(f"{option}: the folder {path.parent} does not exist")


def choose_prompts(held_out: frozenset[Combination], count: int, *, seen: bool) -> list[tuple[str, Combination]]:
    """Prompts with what they name: every combination in the data set's main phrasing, then in the next, and so on.

    held_out: the combinations that training did not show; seen: take the others, in an order that mixes them.
    """
    import numpy as np

    from fastvdiff.data.shapes import CAPTIONS, COLOURS, DIRECTIONS, SHAPES, describe

    if seen:
        others = [each for each in itertools.product(COLOURS, SHAPES, DIRECTIONS) if each not in held_out]
        combinations = [others[i] for i in np.random.default_rng(0).permutation(len(others))]
    else:
        combinations = sorted(held_out)
    prompts = [(describe(each, variant), each) for variant in range(len(CAPTIONS)) for each in combinations]
    return list(itertools.islice(itertools.cycle(prompts), count))


def _sampled(request: Request, prompts: list[tuple[str, Combination]]) -> list[Outcome]:
    """A video for each prompt, and its reading."""
    import numpy as np
    from tqdm import tqdm

    from fastvdiff import use_impl
    from fastvdiff.metrics import read_shape_clip
    from fastvdiff.sampling import TextToVideoPipeline, to_uint8

    outcomes = []
    with contextlib.ExitStack() as stack:
        if request.impl is not None:
            with refusing(ValueError):
                stack.enter_context(use_impl(request.impl))
        with refusing(FileNotFoundError, ValueError, NotImplementedError):
            pipeline = TextToVideoPipeline.from_pretrained(request.checkpoint)
            bar = stack.enter_context(tqdm(total=len(prompts), unit="video", desc="eval"))
            for first in range(0, len(prompts), BATCH):
                batch = prompts[first : first + BATCH]
                seed = request.seed + first
                videos = pipeline(
                    [prompt for prompt, _ in batch],
                    num_inference_steps=request.steps,
                    guidance_scale=request.guidance,
                    seed=seed,
                    progress=False,
                ).frames
                for k, ((prompt, combination), video) in enumerate(zip(batch, to_uint8(videos), strict=True)):
                    shown = video[np.linspace(0, len(video) - 1, min(SHOWN, len(video))).round().astype(int)]
                    outcomes.append(Outcome(prompt, combination, seed + k, shown, read_shape_clip(video)))
                bar.update(len(batch))
    return outcomes


def _report(request: Request, kind: str, outcomes: list[Outcome]) -> dict[str, Any]:
    """The whole result as plain values."""
    from fastvdiff import __version__
    from fastvdiff.metrics import wilson_interval

    def share(right: Callable[[Outcome], bool]) -> dict[str, Any]:
        count = sum(map(right, outcomes))
        low, high = wilson_interval(count, len(outcomes))
        return {"right": count, "share": count / len(outcomes), "interval_95": [low, high]}

    accuracy = {name: share(lambda outcome, name=name: outcome.right(name)) for name in ATTRIBUTES}
    accuracy["all three"] = share(lambda outcome: all(map(outcome.right, ATTRIBUTES)))
    return {
        "version": __version__,
        "checkpoint": request.checkpoint,
        "prompts": kind,
        "videos": len(outcomes),
        "steps": request.steps,
        "guidance": request.guidance,
        "seed": request.seed,
        "accuracy": accuracy,
        "readings": [
            {
                "prompt": outcome.prompt,
                "seed": outcome.seed,
                "named": dict(zip(ATTRIBUTES, outcome.combination, strict=True)),
                "shown": asdict(outcome.reading),
            }
            for outcome in outcomes
        ],
    }


def _print_table(kind: str, report: dict[str, Any]) -> None:
    from rich.table import Table

    from .tables import table_console

    title = f"{report['checkpoint']}: {report['videos']} prompts {kind}, {report['steps']} steps, guidance"
    table = Table("attribute", "right", "share", "95 % confidence", title=f"{title} {report['guidance']:g}")
    for name, values in report["accuracy"].items():
        low, high = values["interval_95"]
        right = f"{values['right']} of {report['videos']}"
        table.add_row(name, right, f"{values['share']:.1%}", f"{low:.1%} to {high:.1%}")
    table_console().print(table)


def draw_sheet(outcomes: list[Outcome], path: Path) -> None:
    """Frames of every video above its prompt's combination; in red what the video shows instead."""
    from PIL import Image, ImageDraw

    width, height = SHOWN * FRAME_SIDE, FRAME_SIDE + LINE
    columns = min(COLUMNS, len(outcomes))
    sheet = Image.new("RGB", (columns * (width + LINE), -(-len(outcomes) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, outcome in enumerate(outcomes):
        left, top = index % columns * (width + LINE), index // columns * height
        for k, frame in enumerate(outcome.frames):
            image = Image.fromarray(frame).resize((FRAME_SIDE, FRAME_SIDE), Image.Resampling.NEAREST)
            sheet.paste(image, (left + k * FRAME_SIDE, top))
        wrong = [f"{name}: {getattr(outcome.reading, name)}" for name in ATTRIBUTES if not outcome.right(name)]
        line = " ".join(outcome.combination)
        pen.text((left + 2, top + FRAME_SIDE + 2), line, fill="black")
        if wrong:
            pen.text((left + 2 + pen.textlength(line + "   "), top + FRAME_SIDE + 2), ", ".join(wrong), fill="red")
    sheet.save(path)
