"""Checkpoints: damage is named, older ones survive a failed save, and only newer verified ones replace them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastvdiff.training import CheckpointError, checkpoints

STATE = {"config": {}, "data": "", "dataset": {}, "fps": 8.0}


def save(run: Path, step: int, keep: int = 2) -> Path:
    generator = torch.Generator().manual_seed(step)
    tensors = {"unet": {"w": torch.randn(64, generator=generator)}, "optimizer": {}}
    return checkpoints.save(run, step, tensors, STATE, keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    checkpoint = checkpoints.load(save(tmp_path, 3))
    expected = torch.randn(64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(checkpoint.tensors["unet"]["w"], expected)
    assert checkpoint.tensors["optimizer"] == {}
    assert checkpoint.state == {"step": 3, **STATE}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 20, 300, 4000):
        save(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-00000300", "checkpoint-00004000"]
    assert checkpoints.resolve(tmp_path, "latest") == tmp_path / "checkpoint-00004000"
    assert checkpoints.resolve(tmp_path, "checkpoint-00000300") == tmp_path / "checkpoint-00000300"
    assert checkpoints.resolve(tmp_path, str(tmp_path / "checkpoint-00000300")) == tmp_path / "checkpoint-00000300"
    save(tmp_path, 500, keep=1)
    assert names(tmp_path) == ["checkpoint-00000500", "checkpoint-00004000"]  # a later one is not this run's to remove


@pytest.mark.parametrize("file", ["unet.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_named(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    path = folder / file
    if damage == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "remove":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"damaged checkpoint: .*; older ones in .*: checkpoint-00000001$"
    ) as error:
        checkpoints.load(folder)
    assert file in str(error.value)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing: no such checkpoint folder"):
        checkpoints.load(tmp_path / "missing")
    folder = checkpoints.save(tmp_path, 1, {}, {"config": {}}, 1)
    with pytest.raises(CheckpointError, match=r"state\.json: lacks data, dataset, fps: not a training checkpoint"):
        checkpoints.load(folder)


@pytest.mark.parametrize("moment", ["save_file", "verify_seal"])
def test_failed_save_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, moment, full)
    with pytest.raises(
        CheckpointError, match=r"could not be written, earlier checkpoints are untouched: .*No space left"
    ):
        save(tmp_path, 3)
    monkeypatch.undo()
    for step in (1, 2):
        checkpoints.load(tmp_path / f"checkpoint-{step:08d}")


def test_killed_save_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt stands for a kill at the worst moment; what a real kill leaves behind is then cleared."""
    save(tmp_path, 1, keep=1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-00000001"]
    checkpoints.load(tmp_path / "checkpoint-00000001")


def test_leftovers_of_killed_saves(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (tmp_path / ".checkpoint-00000002.new-17").mkdir()
    checkpoints.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-00000001"]
    folder.rename(tmp_path / ".checkpoint-00000001.old-17")
    (tmp_path / ".checkpoint-00000001.new-17").mkdir()
    assert checkpoints.resolve(tmp_path, "latest") is None
    checkpoints.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-00000001"]
    checkpoints.load(folder)
