"""Training on the kernels and training on the reference are the same training."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

import fastvdiff
from fastvdiff import dispatch
from fastvdiff.training import Trainer
from tests.small_run import small_config, write_clips

EVERY_STEP = ("output.log_every=1", "output.checkpoint_every=100000", "optimizer.lr=3e-3", "run.ema_decay=0.9")


def losses(tmp_path: Path, clips: Path, name: str, seed: int, *overrides: str) -> list[float]:
    """The loss of every step, on the kernels that this machine has or, for the name "reference", on plain PyTorch."""
    trainer = Trainer(small_config(tmp_path, clips, f"{name}-{seed}", *EVERY_STEP, f"seed={seed}", *overrides))
    if name == "reference":
        with fastvdiff.use_impl("reference"):
            assert trainer.fit()
    else:
        chosen = {walk.chosen for walk in dispatch.trace(trainer._train_step, trainer._batches())}
        if chosen == {"reference"}:
            pytest.skip("no kernel is chosen on this machine")
        trainer = Trainer(trainer.config)
        assert trainer.fit()
    return [json.loads(line)["loss"] for line in (trainer.folder / "log.jsonl").read_text().splitlines()]


def test_the_first_steps_are_the_references(tmp_path: Path, clips: Path) -> None:
    """32 steps in fp32: each loss within 1e-3 of the reference's (Liger-Kernel's bound for a curve)."""
    kernels, reference = (
        losses(tmp_path, clips, name, 0, "run.steps=32", "run.batch_size=5") for name in ("kernels", "reference")
    )
    assert len(kernels) == 32
    assert kernels == pytest.approx(reference, rel=1e-3)
    assert kernels != reference  # the kernels did run: another order of summation
    assert statistics.mean(reference[-8:]) < 0.95 * statistics.mean(reference[:8])


@pytest.mark.long
def test_the_curve_is_inside_the_references_spread(tmp_path: Path) -> None:
    """500 steps, three seeds, in windows of 50 steps: the kernels' mean lies between the reference's seeds.

    And each seed's curve on the kernels differs from its own on the reference by less than two seeds do.
    """
    clips = write_clips(tmp_path / "clips", 64)
    curves: dict[str, list[list[float]]] = {}
    for name in ("kernels", "reference"):
        runs = [losses(tmp_path, clips, name, seed, "run.steps=500", "run.batch_size=4") for seed in range(3)]
        curves[name] = [[statistics.mean(run[first : first + 50]) for first in range(0, 500, 50)] for run in runs]
    for window in range(10):
        kernels, reference = ([run[window] for run in curves[name]] for name in ("kernels", "reference"))
        low, high = min(reference), max(reference)
        print(f"steps {50 * window + 1:3d}-{50 * window + 50}: kernels {kernels}, reference {reference}")
        assert low <= statistics.mean(kernels) <= high
        apart = max(abs(k - r) for k, r in zip(kernels, reference, strict=True))
        assert apart < high - low
    first, last = (statistics.mean(run[window] for run in curves["kernels"]) for window in (0, -1))
    assert last < 0.8 * first
