"""On a CPU: whole training steps of `fastvdiff train`, on the kernels, on the reference, and lucidrains' at its sizes.

A step is what a run does between two log lines: the batch, noise, text, the network's forward and backward, clipping,
the optimizer, the averaged weights. "shapes" is the training that made the shipped checkpoint. Peak memory is what all
tensors made in a step held at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import lucidrains
from benchmarks.memory import peak_bytes
from benchmarks.networks import leave_no_zeros, on_reference
from benchmarks.record import Recorder
from benchmarks.timing import Race
from fastvdiff.cli.train import ASSETS
from fastvdiff.data import write_shapes
from fastvdiff.training import TrainConfig, Trainer

FRAMES, SIZE, CLIPS = 16, 32, 8
CHANNELS, MULTIPLIERS = 32, (1, 2, 4)
# Level by level what lucidrains' Unet3D has: two blocks, 8 heads of 32 over time, a 7x7 stem, rotary and relative
# positions. Over space it has linear attention on all levels, ours is full and on the lower two. It reads no text here;
# with the layers for text ours has twice the parameters (6.6 M against 3.2 M), which works against us.
LUCIDRAINS = {
    "patch_size": 1, "blocks_per_level": 2, "stem_kernel_size": 7, "spatial_attention_levels": [1, 2],
    "num_heads": 8, "head_dim": 32, "temporal_position": '"rotary+relative"',
}  # fmt: skip


def _trainer(folder: Path, name: str, batch: int, changes: dict[str, Any]) -> Trainer:
    clips = folder / "clips"
    if not clips.exists():
        write_shapes(clips, clips=CLIPS, num_frames=FRAMES, size=SIZE)
    config, overrides = ASSETS / "shapes.toml", [f"folder={folder / name}", f"data.folder={clips}"]
    if not name.startswith("shapes"):
        config = folder / f"{name}.toml"
        lines = "\n".join(f"{key} = {value}" for key, value in changes.items())
        config.write_text(f"[optimizer]\nwarmup_steps = 0\n[model.changes]\n{lines}\n")
    trainer = Trainer(TrainConfig.load(config, [*overrides, "run.steps=1000000", f"run.batch_size={batch}"]))
    torch.manual_seed(0)
    leave_no_zeros(trainer.modules["unet"], 0.05)
    return trainer


def _step(trainer: Trainer) -> Any:
    batches = trainer._batches()

    def step() -> Any:
        loss, _ = trainer._train_step(batches)
        trainer.step += 1
        return loss

    return step


@pytest.mark.parametrize(
    ("name", "batch", "changes"),
    [("tiny", 4, {}), ("shapes", 8, {}), ("vdm-32", 1, LUCIDRAINS)],
    ids=["tiny", "shapes", "vdm"],
)
def test_training_step(
    name: str, batch: int, changes: dict[str, Any], tmp_path: Path, benchmark: Any, recorder: Recorder
) -> None:
    """Steps per second and peak memory; the first step's losses are compared before any time is taken."""
    trainers = {
        provider: _trainer(tmp_path, f"{name}-{provider}", batch, changes) for provider in ("eager", "fastvdiff")
    }
    providers = {"eager": on_reference(_step(trainers["eager"])), "fastvdiff": _step(trainers["fastvdiff"])}
    losses = {provider: float(step()) for provider, step in providers.items()}
    assert losses["fastvdiff"] == pytest.approx(losses["eager"], rel=1e-4)
    if benchmark.disabled:
        return
    extra = {"parameters M": sum(p.numel() for p in trainers["eager"].modules["unet"].parameters()) / 1e6}
    if changes and not lucidrains.missing():
        step, parameters = lucidrains.training_step(CHANNELS, MULTIPLIERS, (batch, 3, FRAMES, SIZE, SIZE), 1.0)
        providers["lucidrains"], extra["parameters M lucidrains"] = step, parameters / 1e6
    elif changes:
        print(f"without lucidrains' video-diffusion-pytorch: {lucidrains.missing()}")
    race = Race("fastvdiff", providers)
    race.warm_up()
    benchmark.pedantic(race.contend, setup=race.others, rounds=race.rounds(12 * recorder.budget), iterations=1)
    times = race.spreads()
    for provider, step in providers.items():
        extra[f"steps/s {provider}"] = 1e3 / times[provider].median
        extra[f"peak MB {provider}"] = peak_bytes(step) / 1e6
    recorder.add("training", f"training-step-{name}-batch-{batch}", times, None, extra)
