"""TensorBoard: the log's numbers and the sampled clips in event files, in agreement with the run's own log."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvdiff.training import AveragedModel, Trainer
from tests.small_run import FRAMES, SIZE, small_config
from tests.training.test_trainer import records

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def sampled(average: AveragedModel) -> dict[str, np.ndarray]:
    frames = np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8)
    frames[:, :, :, 0] = 60 * np.arange(FRAMES)[:, None, None]
    return {"a red circle": frames}


def events(folder: Path) -> accumulator.EventAccumulator:
    found = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={accumulator.IMAGES: 0})
    return found.Reload()


def test_scalars_and_clips(tmp_path: Path, clips: Path) -> None:
    config = small_config(tmp_path, clips, "run", "output.tensorboard=true", "output.sample_every=4",
                          "validation.every=4", "validation.clips=2")  # fmt: skip
    trainer = Trainer(config, on_samples=sampled)
    assert trainer.fit()
    found = events(trainer.folder)
    losses = {event.step: event.value for event in found.Scalars("loss")}
    assert losses == pytest.approx({record["step"]: record["loss"] for record in records(trainer) if "loss" in record})
    assert [event.step for event in found.Scalars("validation_loss")] == [4]
    assert {"lr", "clips_per_s", "peak_memory_mib"} < set(found.Tags()["scalars"])
    (image,) = found.Images("samples/a red circle")
    with Image.open(io.BytesIO(image.encoded_image_string)) as gif:
        assert (image.step, gif.format, gif.n_frames) == (4, "GIF", FRAMES)


def test_a_resumed_run_replaces_its_later_points(tmp_path: Path, clips: Path) -> None:
    config = small_config(tmp_path, clips, "run", "output.tensorboard=true", "output.log_every=1")
    trainer = Trainer(config)
    assert trainer.fit()
    again = Trainer(config)
    again.resume("checkpoint-00000002")
    assert again.fit()
    assert [event.step for event in events(trainer.folder).Scalars("loss")] == [1, 2, 3, 4]


def test_without_the_package(tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'tensorboard is not installed: pip install "fastvdiff\[train\]"'):
        Trainer(small_config(tmp_path, clips, "run", "output.tensorboard=true"))
    Trainer(small_config(tmp_path, clips))
