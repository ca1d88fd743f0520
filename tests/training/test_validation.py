"""The loss on held-out clips: the same question every time, and training does not notice it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastvdiff.training import CheckpointError, ConfigError, Trainer
from fastvdiff.training.clips import open_clips, open_held_out
from tests.small_run import small_config, write_clips
from tests.training.test_trainer import assert_bitwise, everything, records

HELD_OUT = ("validation.every=2", "validation.clips=3")


def paths(clips: object) -> set[Path]:
    return {clip.path for clip in clips.clips}


def test_held_out_clips_are_not_trained_on(tmp_path: Path, clips: Path) -> None:
    config = small_config(tmp_path, clips, "run", *HELD_OUT, "data.random_flip=true")
    trained, held_out = open_clips(config), open_held_out(config)
    assert (len(trained), len(held_out)) == (7, 3)
    assert not paths(trained) & paths(held_out)
    assert not held_out.random_flip
    assert paths(open_held_out(config)) == paths(held_out)
    others = {frozenset(paths(open_held_out(small_config(tmp_path, clips, "run", *HELD_OUT, f"seed={seed}"))))
              for seed in range(4)}  # fmt: skip
    assert len(others) > 1
    with pytest.raises(
        ValueError, match=r"validation\.clips: 9 held out of .* leave 1 clips to train on, run\.batch_s"
    ):
        open_clips(small_config(tmp_path, clips, "run", "validation.every=2", "validation.clips=9"))
    assert open_held_out(small_config(tmp_path, clips)) is None


def test_the_same_clips_levels_and_noise_every_time(tmp_path: Path, clips: Path) -> None:
    def losses(*overrides: str) -> dict[str, float]:
        trainer = Trainer(small_config(tmp_path, clips, "run", *HELD_OUT, "validation.levels=[0.2, 0.8]", *overrides))
        torch.nn.init.normal_(
            trainer.average.modules["unet"].conv_out.weight, generator=torch.Generator().manual_seed(3)
        )
        return trainer.validation.losses(trainer.average.modules)

    first = losses()
    assert set(first) == {"validation_loss", "validation_loss_at_0.2", "validation_loss_at_0.8"}
    assert first["validation_loss"] == pytest.approx(
        (first["validation_loss_at_0.2"] + first["validation_loss_at_0.8"]) / 2
    )
    assert first["validation_loss_at_0.2"] != first["validation_loss_at_0.8"]
    torch.manual_seed(7)
    assert (
        losses(
            "diffusion.snr_gamma=5",
            "diffusion.snr_floor=1",
            "diffusion.unconditional=0.9",
            "diffusion.timestep_shift=3",
        )
        == first
    )
    assert losses("run.batch_size=1") == pytest.approx(first, rel=1e-5)


def test_loss_is_that_of_the_objective(tmp_path: Path, clips: Path) -> None:
    """A fresh network says 0, so its loss is the mean square of what it should say: of the noise, about 1."""
    trainer = Trainer(small_config(tmp_path, clips, "run", *HELD_OUT, "diffusion.prediction_type=epsilon"))
    noise = torch.cat([trainer.validation._noise([index], (1, 3, 4, 8, 8)) for index in range(3)])
    for value in trainer.validation.losses(trainer.average.modules).values():
        assert value == pytest.approx(noise.square().mean().item(), rel=1e-5)


def test_training_does_not_notice(tmp_path: Path, clips: Path) -> None:
    elsewhere = write_clips(tmp_path / "others", 4)
    plain = Trainer(small_config(tmp_path, clips, "plain"))
    watched = Trainer(small_config(tmp_path, clips, "watched", "validation.every=3", f"validation.folder={elsewhere}"))
    assert len(watched.dataset) == 10
    assert len(watched.validation.clips) == 4
    assert plain.fit()
    assert watched.fit()
    assert_bitwise(everything(plain), everything(watched))
    measured = [record for record in records(watched) if "validation_loss" in record]
    assert [record["step"] for record in measured] == [3, 4]
    assert measured[0]["validation_loss"] > 0


def test_resuming_keeps_the_clips_held_out(tmp_path: Path, clips: Path) -> None:
    config = small_config(tmp_path, clips, "run", *HELD_OUT)
    trainer = Trainer(config)
    assert trainer.fit()
    again = Trainer(config)
    again.resume("checkpoint-00000002")
    assert again.fit()
    assert_bitwise(everything(trainer), everything(again))
    assert [record["step"] for record in records(again)] == [2, 2, 4, 4]
    for other in ((), ("validation.every=2", "validation.clips=2")):
        with pytest.raises(CheckpointError, match=r"of another run: the clips held out \(validation\) differ"):
            Trainer(small_config(tmp_path, clips, "run", *other)).resume("latest")


def test_levels_are_checked(tmp_path: Path, clips: Path) -> None:
    for levels, message in (("[]", "levels: expected one or more"), ("[0.5, 0.5]", "levels: expected one or more"),
                            ("[1.5]", r"validation\.levels: expected a number at least 0 and at most 1")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            small_config(tmp_path, clips, "run", f"validation.levels={levels}")
