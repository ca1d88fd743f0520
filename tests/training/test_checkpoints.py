"""Checkpoints: damage is named, older ones survive a failed save, and only newer verified ones replace them."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from fastvdiff import sealed
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


@pytest.mark.parametrize(
    "moment", ["checkpoints.save_file", "sealed._sync", "sealed._seal", "sealed.verify_seal", "sealed._take_place"]
)
def test_failed_save_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    module, _, name = moment.partition(".")
    monkeypatch.setattr({"checkpoints": checkpoints, "sealed": sealed}[module], name, full)
    with pytest.raises(
        CheckpointError, match=r"could not be written, earlier checkpoints are untouched: .*No space left"
    ):
        save(tmp_path, 3)
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoint-00000001", "checkpoint-00000002"]
    for step in (1, 2):
        checkpoints.load(tmp_path / f"checkpoint-{step:08d}")


def test_full_disk(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk's end: the writer itself fails, inside safetensors."""
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, before[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written, earlier checkpoints are untouched"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["checkpoint-00000001"]
    checkpoints.load(tmp_path / "checkpoint-00000001")


def test_what_reads_back_differently_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses a bit between the hash and the reading back: neither this step's earlier save nor another."""
    for step in (1, 2):
        save(tmp_path, step)
    expected = checkpoints.load(tmp_path / "checkpoint-00000002")
    seal = sealed._seal

    def seal_and_lose_a_bit(folder: Path) -> None:
        seal(folder)
        data = bytearray((folder / "unet.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "unet.safetensors").write_bytes(data)

    monkeypatch.setattr(sealed, "_seal", seal_and_lose_a_bit)
    for step in (2, 3):
        with pytest.raises(CheckpointError, match=r"could not be written, .*unet\.safetensors: damaged"):
            save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["checkpoint-00000001", "checkpoint-00000002"]
    there = checkpoints.load(tmp_path / "checkpoint-00000002")
    assert torch.equal(there.tensors["unet"]["w"], expected.tensors["unet"]["w"])


def test_killed_removal_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)

    def killed(folder: Path, **_: object) -> None:
        if ".gone-" in folder.name:
            (folder / "unet.safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert checkpoints.found(tmp_path) == [tmp_path / "checkpoint-00000002"]
    checkpoints.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-00000002"]


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
