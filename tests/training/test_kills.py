"""SIGKILL at any moment: nothing that was saved is lost, and the run goes on to the same bits."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from fastvdiff.data import BatchSchedule
from fastvdiff.training import Trainer, checkpoints
from tests.small_run import small_config, write_config
from tests.training import killed_run

SEED = 0


@pytest.fixture(autouse=True, scope="module")
def _warm() -> None:
    killed_run.warm_up()


def assert_same_training(left: Path, right: Path) -> None:
    """Parameters, averages and optimizer state of two checkpoints, bit for bit."""
    mine, theirs = checkpoints.load(left).tensors, checkpoints.load(right).tensors
    for stem in ("unet", "text_encoder", "ema_unet", "ema_text_encoder", "optimizer"):
        assert mine[stem].keys() == theirs[stem].keys()
        different = [name for name in mine[stem] if not torch.equal(mine[stem][name], theirs[stem][name])]
        assert not different, f"{stem}: {different}"


def uninterrupted(tmp_path: Path, clips: Path, steps: int, *overrides: str) -> Path:
    """The last checkpoint of the same run in one go, in this process."""
    config = small_config(tmp_path, clips, "whole", f"run.steps={steps}", "output.checkpoint_every=100000", *overrides)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert Trainer(config).fit()
    finally:
        torch.set_num_threads(threads)
    return checkpoints.found(tmp_path / "whole")[-1]


def finish(config: Path, journal: Path, *overrides: str) -> None:
    process = killed_run.start(config, journal, overrides)
    process.join(120)
    assert process.exitcode == 0, journal.with_suffix(".out").read_text()


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, clips: Path, workers: int) -> None:
    """Six steps, SIGKILL once the second is saved, the rest: weights, averages, optimizer and the order of clips."""
    config = write_config(tmp_path / "parts.toml", clips, tmp_path / "parts", steps=6)
    journal = tmp_path / "journal"
    overrides = (f"data.workers={workers}", "data.random_flip=true")
    process = killed_run.start(config, journal, overrides)
    killed_run.wait_for_saves(process, journal, 1)
    process.kill()
    process.join()
    finish(config, journal, *overrides)
    whole = uninterrupted(tmp_path, clips, 6, "data.random_flip=true")
    assert_same_training(checkpoints.found(tmp_path / "parts")[-1], whole)
    seen = {line["step"]: line["clips"] for line in killed_run.noted(journal) if "clips" in line}
    assert seen == {step: BatchSchedule(10, 2).batch(step) for step in range(6)}


def kill_again_and_again(tmp_path: Path, clips: Path, kills: int) -> None:
    """Saves after every step make most moments moments of a save, a replacement or a removal.

    The moments are drawn: a number of saves, possibly none, and then a time of the order of a step and its save. Every
    third time the run goes on from an older checkpoint, so that later ones are replaced under their names.
    """
    draw = random.Random(SEED)
    run, journal = tmp_path / "run", tmp_path / "journal"
    config = write_config(tmp_path / "run.toml", clips, run)
    overrides = ("run.steps=100000", "output.checkpoint_every=1", "optimizer.schedule=constant")
    trained = 0
    for kill in range(kills):
        there = checkpoints.found(run)
        resume = there[0].name if there and kill % 3 == 2 else "latest"
        process = killed_run.start(config, journal, overrides, resume)
        killed_run.wait_for_saves(process, journal, draw.randrange(3))
        time.sleep(draw.uniform(0.0, 0.2))
        process.kill()
        process.join()
        for folder in checkpoints.found(run):
            checkpoints.load(folder)
        run.mkdir(exist_ok=True)  # killed before it made one
        checkpoints.remove_leftovers(run)
        saved = killed_run.last_saved(journal)
        if saved >= 0:
            latest = checkpoints.resolve(run, "latest")
            assert latest is not None
            assert checkpoints.load(latest).state["step"] >= saved, f"kill {kill}: save {saved} is lost"
            trained = checkpoints.step_of(latest)
    steps = trained + 2
    finish(config, journal, *overrides, f"run.steps={steps}")
    whole = uninterrupted(tmp_path, clips, steps, "optimizer.schedule=constant")
    assert_same_training(checkpoints.resolve(run, "latest"), whole)


def test_killed_at_random_moments(tmp_path: Path, clips: Path) -> None:
    kill_again_and_again(tmp_path, clips, 6)


@pytest.mark.long
def test_killed_at_fifty_random_moments(tmp_path: Path, clips: Path) -> None:
    kill_again_and_again(tmp_path, clips, 50)
