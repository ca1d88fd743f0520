"""`fastvdiff data shapes`: a data set of moving shapes as video files."""

from __future__ import annotations

from pathlib import Path

import typer
from tqdm import tqdm

from .errors import refusing


def shapes(
    folder: Path, clips: int, frames: int, size: int, fps: float, seed: int, held_out: float, backgrounds: list[str]
) -> None:
    """Write the data set, or leave it as it is where the very same one is complete."""
    from fastvdiff.data import write_shapes
    from fastvdiff.data.shapes import BACKGROUNDS

    with refusing(ValueError, OSError), tqdm(total=clips, unit="clip", desc="shapes") as bar:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_shapes(
            folder,
            clips=clips,
            num_frames=frames,
            size=size,
            fps=fps,
            seed=seed,
            held_out=held_out,
            backgrounds=backgrounds or BACKGROUNDS,
            progress=lambda done, _: bar.update(done - bar.n),
        )
    typer.echo(f"{folder}: {clips} clips of {frames} frames, {size}x{size} at {fps:g} fps, seed {seed}")
