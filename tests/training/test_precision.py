"""fp16: the loss is scaled, steps that overflow are left out, and the scale is part of the run's state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastvdiff.training import Trainer, TrainingError
from fastvdiff.training import checkpoints as store
from tests.small_run import small_config
from tests.training.test_trainer import assert_bitwise, everything, records


def overflowing_at(trainer: Trainer, *steps: int) -> None:
    """The gradient of one bias becomes infinite in these steps, as a float16 overflow would leave it."""
    bias = trainer.modules["unet"].conv_out.bias
    bias.register_hook(lambda grad: torch.full_like(grad, torch.inf) if trainer.step in steps else grad)


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_an_overflow_leaves_the_step_out(tmp_path: Path, clips: Path, matrices: str) -> None:
    config = small_config(tmp_path, clips, "run", "run.precision=fp16", "run.steps=3", "output.log_every=1",
                          f"optimizer.matrices={matrices}")  # fmt: skip
    trainer = Trainer(config)
    before = {name: parameter.detach().clone() for name, parameter in trainer.optimizer.parameters.items()}
    overflowing_at(trainer, 0)
    batches = trainer._batches()
    trainer._train_step(batches)
    assert_bitwise(before, trainer.optimizer.parameters)
    assert trainer.precision.scaler.get_scale() == 2.0**15
    trainer.step = 1
    trainer._train_step(batches)
    assert any(not torch.equal(before[name], p) for name, p in trainer.optimizer.parameters.items())

    trainer = Trainer(config)
    overflowing_at(trainer, 1)
    assert trainer.fit()
    assert [record["skipped_steps"] for record in records(trainer)] == [0, 1, 0]
    assert [record["loss_scale"] for record in records(trainer)] == [2.0**16, 2.0**15, 2.0**15]
    assert records(trainer)[1]["loss"] is None
    resumed = Trainer(config)
    resumed.resume("latest")
    assert resumed.precision.scaler.state_dict() == trainer.precision.scaler.state_dict()
    assert resumed.precision.scaler.get_scale() == 2.0**15


def test_losses_that_no_scale_can_help_end_the_run(tmp_path: Path, clips: Path) -> None:
    config = small_config(tmp_path, clips, "run", "run.precision=fp16", "run.steps=18", "output.checkpoint_every=100",
                          "output.log_every=18")  # fmt: skip
    trainer = Trainer(config)
    overflowing_at(trainer, *range(18))
    with pytest.raises(TrainingError, match=r"the fp16 loss scale fell to .*, no gradient is finite; there is no"):
        trainer.fit()
    assert store.found(trainer.folder) == []


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 1e-3), ("fp16", 2e-4)])
def test_reduced_precision_follows_fp32(tmp_path: Path, clips: Path, precision: str, tolerance: float) -> None:
    losses = {}
    for name in ("fp32", precision):
        trainer = Trainer(small_config(tmp_path, clips, name, f"run.precision={name}", "output.log_every=1"))
        assert trainer.fit()
        losses[name] = [record["loss"] for record in records(trainer)]
        assert all(p.dtype == torch.float32 for p in trainer.optimizer.parameters.values())
    assert losses[precision] == pytest.approx(losses["fp32"], rel=tolerance)
    assert losses[precision] != losses["fp32"]


def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, clips: Path) -> None:
    overrides = ("model.changes.dropout=0.2",)
    plain = Trainer(small_config(tmp_path, clips, "plain", *overrides))
    recomputed = Trainer(small_config(tmp_path, clips, "recomputed", *overrides, "run.gradient_checkpointing=true"))
    assert recomputed.modules["unet"].gradient_checkpointing
    assert plain.fit()
    assert recomputed.fit()
    assert_bitwise(everything(plain), everything(recomputed))
