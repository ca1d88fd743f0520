"""What goes wrong outside: a clip, the disk. A clear error each, and nothing that was trained is lost."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path

import pytest

from fastvdiff.training import CheckpointError, Trainer, TrainingError
from fastvdiff.training import checkpoints as store
from tests.small_run import small_config, write_clips
from tests.training.test_trainer import assert_bitwise, everything, records, trained

STEPS = ("run.steps=5", "output.checkpoint_every=100")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_is_gone_costs_no_step(tmp_path: Path, workers: int) -> None:
    clips = write_clips(tmp_path / "clips")
    config = small_config(tmp_path, clips, "run", *STEPS, f"data.workers={workers}")
    trainer = Trainer(config)
    gone = trainer.dataset.clips[trainer.schedule.batch(3)[1]].path
    kept = gone.rename(gone.with_suffix(".kept"))
    with pytest.raises(
        TrainingError, match=rf"{gone.name}: no such file; step 3 is saved in .*run: go on with --resume"
    ) as error:
        trainer.fit()
    assert error.tb  # which holds the frames that the loader's processes are used in
    assert not multiprocessing.active_children()
    assert [folder.name for folder in store.found(trainer.folder)] == ["checkpoint-00000003"]
    kept.rename(gone)
    whole = trained(small_config(tmp_path, clips, "whole", *STEPS))
    assert_bitwise(everything(trained(config, "latest")), everything(whole))


def test_a_clip_that_is_gone_at_the_start_leaves_no_checkpoint(tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips")
    config = small_config(tmp_path, clips, "run", *STEPS)
    trainer = Trainer(config)
    gone = trainer.dataset.clips[trainer.schedule.batch(0)[0]].path
    kept = gone.rename(gone.with_suffix(".kept"))
    with pytest.raises(TrainingError, match="no such file; nothing was trained yet"):
        trainer.fit()
    assert store.found(trainer.folder) == []
    kept.rename(gone)
    assert Trainer(config).fit()


def test_a_full_disk(tmp_path: Path, clips: Path) -> None:
    """A limit on the size of files stands for the end of the disk: the log still fits, no checkpoint does."""
    config = small_config(tmp_path, clips, "run", "run.steps=4")
    trainer = Trainer(config, say=lambda _: None)
    save, saves = store.save, []

    def save_until_the_disk_is_full(*arguments: object) -> Path:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if saves:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            saves.append(save(*arguments))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return saves[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "save", save_until_the_disk_is_full)
        with pytest.raises(
            CheckpointError, match=r"checkpoint-00000004: could not be written, earlier checkpoints are"
        ):
            trainer.fit()
    assert [path.name for path in trainer.folder.glob("*checkpoint*")] == ["checkpoint-00000002"]
    whole = trained(small_config(tmp_path, clips, "whole"))
    assert_bitwise(everything(trained(config, "latest")), everything(whole))


def test_a_log_that_cannot_be_written(tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, clips, "run", "output.checkpoint_every=100")
    trainer = Trainer(config)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastvdiff.training.log.MetricsLog.write", full)
    with pytest.raises(TrainingError, match=r"No space left on device; step 2 is saved in .*run: go on with"):
        trainer.fit()
    assert [folder.name for folder in store.found(trainer.folder)] == ["checkpoint-00000002"]


def test_other_videos_under_the_same_names(tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips")
    config = small_config(tmp_path, clips)
    trainer = trained(config)
    path = trainer.dataset.clips[0].path
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(
        CheckpointError, match=r"of another run: the clips in .* had [\d,]+ bytes, they have [\d,]+ now"
    ):
        Trainer(config).resume("latest")


def test_two_trainers_in_one_process_take_turns(tmp_path: Path, clips: Path) -> None:
    """The folder is claimed while a run is on, and free afterwards."""
    config = small_config(tmp_path, clips)
    assert len(records(trained(config))) == 2
    assert trained(config, "latest").step == 4
