"""The trainer: it learns, and it is a function of its configuration however often it stops."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvdiff.training import AveragedModel, CheckpointError, Trainer, TrainingError, load_average
from fastvdiff.training import checkpoints as store
from tests.small_run import small_config


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every tensor that a run depends on."""
    tensors = {}
    for name, module in [*trainer.modules.items(), *((f"ema_{n}", m) for n, m in trainer.average.modules.items())]:
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    return tensors | trainer.optimizer.state_tensors()


def assert_bitwise(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def records(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trainer.folder / "log.jsonl").read_text().splitlines()]


def trained(config: Any, resume: str | None = None) -> Trainer:
    trainer = Trainer(config)
    if resume is not None:
        trainer.resume(resume)
    assert trainer.fit()
    return trainer


def test_loss_falls(tmp_path: Path, clips: Path) -> None:
    config = small_config(tmp_path, clips, "run", "run.steps=60", "run.batch_size=5", "output.log_every=20",
                          "optimizer.lr=1e-2", "output.checkpoint_every=1000")  # fmt: skip
    losses = [record["loss"] for record in records(trained(config))]
    assert len(losses) == 3
    assert losses[-1] < 0.94 * losses[0]


VARIANTS = {
    "plain": (),
    "accumulate": ("run.accumulate=2", "run.batch_size=1"),
    "dropout": ("model.changes.dropout=0.3", "data.random_flip=true"),
    "bf16": ("run.precision=bf16",),
    "fp16": ("run.precision=fp16",),
    "min_snr": ("diffusion.snr_gamma=5", "diffusion.prediction_type=epsilon", "diffusion.noise=mixed"),
    "worker": ("data.workers=1", "diffusion.prediction_type=sample"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stop_and_resume_equals_going_through(tmp_path: Path, clips: Path, variant: str) -> None:
    whole = trained(small_config(tmp_path, clips, "whole", *VARIANTS[variant]))
    config = small_config(tmp_path, clips, "parts", *VARIANTS[variant], "output.keep=3")
    trained(config)
    again = trained(config, str(tmp_path / "parts" / "checkpoint-00000002"))
    assert again.step == 4
    assert_bitwise(everything(whole), everything(again))
    assert [record["step"] for record in records(again)] == [2, 4]


def test_workers_see_the_same_batches(tmp_path: Path, clips: Path) -> None:
    here = trained(small_config(tmp_path, clips, "here"))
    there = trained(small_config(tmp_path, clips, "there", "data.workers=1"))
    assert_bitwise(everything(here), everything(there))


def test_seed_and_step_are_all_that_matters(tmp_path: Path, clips: Path) -> None:
    first = trained(small_config(tmp_path, clips, "a"))
    torch.manual_seed(123)
    torch.rand(3)
    state = torch.get_rng_state()
    second = trained(small_config(tmp_path, clips, "b"))
    assert torch.equal(torch.get_rng_state(), state)
    assert_bitwise(everything(first), everything(second))
    other = everything(trained(small_config(tmp_path, clips, "c", "seed=1")))
    assert any(not torch.equal(value, other[name]) for name, value in everything(first).items())


def test_accumulated_batches_count_as_one(tmp_path: Path, clips: Path) -> None:
    """Two micro-batches give the mean of their gradients: the first step's norm is that of the sum over two."""
    config = small_config(tmp_path, clips, "run", "run.accumulate=2", "run.batch_size=1", "run.steps=2")
    trainer = Trainer(config)
    batches = trainer._batches()
    norms = []
    for micro in range(2):
        batch = next(batches)
        draws = trainer.objective.draw(micro, batch["video"].shape)
        loss = trainer.objective.loss(*trainer.modules.values(), batch["video"], batch["caption"], draws)
        (loss.mean() / 2).backward()
        norms.append(loss.item())
    expected = torch.nn.utils.get_total_norm(
        [p.grad for p in trainer.optimizer.parameters.values() if p.grad is not None]
    )
    loss, norm = Trainer(config)._train_step(Trainer(config)._batches())
    assert norm == expected
    assert loss.item() == pytest.approx(sum(norms) / 2, rel=1e-6)


def test_folder_log_and_checkpoints(tmp_path: Path, clips: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def look(average: AveragedModel) -> None:
        seen.append((average.step, average.unet.training or average.text_encoder.training))

    config = small_config(tmp_path, clips, "run", "output.keep=1", "output.sample_every=3", "run.steps=5")
    trainer = Trainer(config, on_samples=look)
    assert trainer.fit()
    assert seen == [(3, False), (5, False)]
    assert [path.name for path in store.found(trainer.folder)] == ["checkpoint-00000005"]
    assert type(config).load(trainer.folder / "config.toml") == config
    assert [record["step"] for record in records(trainer)] == [2, 4, 5]
    known = {"step", "loss", "grad_norm", "lr", "steps_per_s", "clips_per_s", "peak_memory_mib"}
    assert set(records(trainer)[0]) == known
    assert records(trainer)[0]["clips_per_s"] == pytest.approx(2 * records(trainer)[0]["steps_per_s"])
    assert trainer.fps == pytest.approx(8)

    average = load_average(trainer.folder)
    assert (average.step, average.config, average.dataset["kind"]) == (5, config, "shapes")
    assert_bitwise(average.unet.state_dict(), trainer.averaged().unet.state_dict())
    assert_bitwise(average.text_encoder.state_dict(), trainer.averaged().text_encoder.state_dict())


def test_random_states_and_positions_are_saved(tmp_path: Path, clips: Path) -> None:
    """What a callback draws from the process's own generators goes on after a stop as without one."""
    drawn: list[tuple[float, float, float]] = []

    def draw(_: AveragedModel) -> None:
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))

    config = small_config(tmp_path, clips, "run", "output.sample_every=1", "run.steps=6", "output.keep=3")
    assert Trainer(config, on_samples=draw).fit()
    whole, drawn = drawn, []
    again = Trainer(config, on_samples=draw)
    folder = again.resume("checkpoint-00000004")
    assert again.fit()
    assert drawn == whole[4:]
    state = store.load(folder).state
    assert state["position"] == {"epoch": 0, "batch": 4}
    assert state["lr"] == pytest.approx(again._next_lr(4))
    assert len(state["config_hash"]) == len(state["data"]) == 64
    assert state["data_bytes"] == sum(clip.path.stat().st_size for clip in again.dataset.clips)


def test_average_lags_behind(tmp_path: Path, clips: Path) -> None:
    trainer = trained(small_config(tmp_path, clips))
    average, weights = trainer.averaged().unet.state_dict(), trainer.modules["unet"].state_dict()
    assert any(not torch.equal(average[name], weights[name]) for name in weights)
    assert [trainer.average.decay_at(n) for n in (0, 8, 10**6)] == [0.1, 0.5, 0.999]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_saves_and_says_so(tmp_path: Path, clips: Path, number: int) -> None:
    said: list[str] = []
    config = small_config(tmp_path, clips, "run", "output.checkpoint_every=100", "output.sample_every=1")
    trainer = Trainer(config, on_samples=lambda _: os.kill(os.getpid(), number), say=said.append)
    before = signal.getsignal(number)
    assert not trainer.fit()
    assert signal.getsignal(number) == before
    assert said == [
        f"interrupted: step 1 of 4 is saved in {trainer.folder}; go on with --resume_from_checkpoint latest"
    ]
    resumed = trained(config, "latest")
    assert_bitwise(everything(resumed), everything(trained(small_config(tmp_path, clips, "whole"))))


def test_loss_that_is_not_finite_ends_the_run(tmp_path: Path, clips: Path) -> None:
    trainer = Trainer(small_config(tmp_path, clips, "run", "output.checkpoint_every=1", "output.log_every=100"))
    with torch.no_grad():
        trainer.modules["unet"].conv_out.bias.fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"step 1: loss is (inf|nan); there is no checkpoint yet\. Try a lower"):
        trainer.fit()
    assert store.found(trainer.folder) == []


def test_gradient_that_is_not_finite_is_not_saved(tmp_path: Path, clips: Path) -> None:
    trainer = Trainer(small_config(tmp_path, clips, "run", "output.checkpoint_every=2", "output.log_every=100"))
    trainer.modules["unet"].conv_out.bias.register_hook(lambda grad: grad * float("nan") if trainer.step == 1 else grad)
    with pytest.raises(TrainingError, match=r"step 2: grad_norm is nan; there is no checkpoint yet"):
        trainer.fit()
    assert store.found(trainer.folder) == []


def test_a_run_that_is_done_has_nothing_to_do(tmp_path: Path, clips: Path) -> None:
    config = small_config(tmp_path, clips)
    before = everything(trained(config))
    assert_bitwise(everything(trained(config, "latest")), before)
    assert_bitwise(everything(trained(small_config(tmp_path, clips, "run", "run.steps=3"), "latest")), before)


def test_a_run_is_not_overwritten_by_accident(tmp_path: Path, clips: Path) -> None:
    config = small_config(tmp_path, clips)
    trained(config)
    with pytest.raises(CheckpointError, match="already holds checkpoint-00000004; go on with"):
        Trainer(config).fit()


def test_resuming_refuses_other_runs(tmp_path: Path, clips: Path) -> None:
    trained(small_config(tmp_path, clips))
    for override in ("text.depth=2", "diffusion.unconditional=0.2", "model.changes.dropout=0.1", "seed=7"):
        key = override.partition("=")[0].replace(".dropout", "")
        with pytest.raises(CheckpointError, match=f"of another run: {key} differ from this configuration"):
            Trainer(small_config(tmp_path, clips, "run", override)).resume("latest")
    said: list[str] = []
    Trainer(small_config(tmp_path, clips, "run", "optimizer.lr=1e-5"), say=said.append).resume("latest")
    assert said == ["resuming with other values than before for optimizer.lr"]
    assert Trainer(small_config(tmp_path, clips, "fresh")).resume("latest") is None
    with pytest.raises(
        CheckpointError, match=r"checkpoint-9: no such checkpoint; in .*: checkpoint-00000002, checkpoint"
    ):
        Trainer(small_config(tmp_path, clips)).resume("checkpoint-9")


def test_devices(tmp_path: Path, clips: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.device: expected 'auto', 'cpu', 'cuda' or 'cuda:<n>', got 'tpu9'"):
        Trainer(small_config(tmp_path, clips, "run", "run.device=tpu9"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"run\.device: 'cuda' was asked for, and torch can use no GPU here"):
            Trainer(small_config(tmp_path, clips, "run", "run.device=cuda"))
