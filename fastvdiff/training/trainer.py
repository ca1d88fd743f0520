"""The training loop: a function of its configuration, so that stopping, resuming and repeating change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from fastvdiff.data import Batch, BatchSchedule, VideoError
from fastvdiff.data.atomic import written_aside
from fastvdiff.models import VideoUNet
from fastvdiff.text import ByteTextEncoder

from . import checkpoints, clips, run_state
from .averaged import AveragedModel
from .checkpoints import CheckpointError
from .claim import claimed
from .config import TrainConfig
from .ema import ExponentialAverage
from .interruption import Interruption
from .log import Meter, RunLog
from .objective import Objective, stream_seed
from .optimizer import NamedOptimizer, learning_rate
from .precision import Precision
from .schema import dump_toml
from .tensorboard import require_tensorboard
from .validation import Validation

Clips = Mapping[str, np.ndarray]
OnSamples = Callable[[AveragedModel], Clips | None]


class TrainingError(RuntimeError):
    """The run cannot go on (a loss that is not finite); what was saved before is untouched."""


class Trainer:
    """Trains a VideoUNet and its text encoder together as a `TrainConfig` says.

    ```python
    trainer = Trainer(TrainConfig.load("train.toml"))
    trainer.resume("latest")                     # optional
    finished = trainer.fit()                     # False: interrupted, saved
    trainer.averaged().unet                      # the network to sample with
    ```

    The folder `config.folder` receives `config.toml` (resolved), `log.jsonl` and `checkpoint-<step>` folders. Batches,
    noise, timesteps and dropout are functions of (seed, step): N steps, a stop and N more equal 2N steps bit for bit.

    on_samples: called with the averaged model every `output.sample_every` steps; clips that it returns by name, uint8
    (T, H, W, 3), go to TensorBoard. say: where messages go.

    Raises ValueError or FileNotFoundError for data that cannot be read.
    """

    def __init__(
        self, config: TrainConfig, *, on_samples: OnSamples | None = None, say: Callable[[str], None] = tqdm.write
    ) -> None:
        self.config, self.on_samples, self.say = config, on_samples, say
        if config.output.tensorboard:
            require_tensorboard()
        self.folder = Path(config.folder)
        self.device = _device(config.run.device)
        self.dataset = clips.open_clips(config)
        self.data_hash, self.data_bytes = clips.identity(self.dataset)
        self.schedule = BatchSchedule(len(self.dataset), config.run.batch_size, config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "weights", 0))
            unet = VideoUNet(config.model.resolved())
            text_encoder = ByteTextEncoder(config.text.resolved(unet.config.cross_attention_dim))
        if config.run.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.modules: dict[str, nn.Module] = {
            "unet": unet.to(self.device).train(),
            "text_encoder": text_encoder.to(self.device).train(),
        }
        self.average = ExponentialAverage(self.modules, config.run.ema_decay)
        parameters = {
            f"{module}.{name}": parameter
            for module, each in self.modules.items()
            for name, parameter in each.named_parameters()
        }
        self.optimizer = NamedOptimizer(parameters, config.optimizer)
        self.objective = Objective(config.diffusion, config.seed, self.device)
        self.precision = Precision(config.run.precision, self.device)
        held_out = clips.open_held_out(config)
        self.validation = None if held_out is None else Validation(held_out, config, self.objective, self.precision)
        self.fps = clips.frame_rate(self.dataset, config.data.fps)
        self.step = 0
        self._saved_step: int | None = None

    def resume(self, wanted: str = "latest") -> Path | None:
        """Go on from a checkpoint: "latest" in the run's folder (None where there is none yet), a name or a path.

        Raises CheckpointError where it is missing, damaged, or of a run whose network, text, diffusion, seed or data
        differ from this configuration's. Other differences (rates, lengths) are reported and taken as wanted.
        """
        with claimed(self.folder):
            checkpoints.remove_leftovers(self.folder)
            folder = checkpoints.resolve(self.folder, wanted)
            if folder is None:
                return None
            run_state.restore(self, folder, checkpoints.load(folder))
        self._saved_step = self.step
        later = [other.name for other in checkpoints.found(self.folder) if checkpoints.step_of(other) > self.step]
        if later:
            self.say(f"{', '.join(later)} will be overwritten when the run comes there again")
        return folder

    def averaged(self) -> AveragedModel:
        """The averaged network and text encoder with what they were trained for."""
        described = clips.description(self.dataset)
        return AveragedModel(self.config, self.step, self.fps, described, **self.average.modules)

    def fit(self) -> bool:
        """Train up to `run.steps`; True when they are done, False after an interruption. Either way all is saved.

        Raises TrainingError when the loss is no longer finite, or a clip or the disk fails (what was trained is saved
        first), CheckpointError where the folder holds checkpoints and `resume` was not called, another process trains
        there, or the disk refuses a checkpoint.
        """
        config = self.config
        meter = Meter(self.device, config.run.batch_size * config.run.accumulate, self.precision.scaler.is_enabled())
        with claimed(self.folder), Interruption() as interruption, self._progress_bar() as bar:
            self._prepare_folder()
            batches = self._batches()
            try:
                with RunLog(self.folder, self.step, config.output.tensorboard) as log:
                    self._run(batches, log, meter, interruption, bar)
            except (VideoError, OSError) as error:
                self._save_what_there_is(error, meter)
            finally:
                clips.end_workers(batches)
            if self.step < config.run.steps:
                self.save(meter)
                self.say(
                    f"interrupted: step {self.step} of {config.run.steps} is saved in {self.folder}; "
                    "go on with --resume_from_checkpoint latest"
                )
        return self.step >= config.run.steps

    def _run(self, batches: Iterator[Batch], log: RunLog, meter: Meter, interruption: Interruption, bar: tqdm) -> None:
        """The steps themselves, with what is due after each: the log, the validation, a checkpoint, samples."""
        output = self.config.output
        while self.step < self.config.run.steps and not interruption.requested:
            meter.add(*self._train_step(batches))
            self.step += 1
            bar.update()
            if self._due(output.log_every):
                values = meter.read(self._next_lr(self.step - 1)) | self.precision.log_values()
                self._require_finite(values)
                log.write(self.step, values)
                bar.set_postfix(loss=values["loss"])
            with meter.paused():
                if self.validation is not None and self._due(self.config.validation.every):
                    log.write(self.step, self.validation.losses(self.average.modules))
                try:
                    if self.on_samples is not None and self._due(output.sample_every):
                        log.clips(self.step, self.on_samples(self.averaged()) or {}, self.fps)
                finally:  # the checkpoint comes last, so that a resumed run repeats nothing of this step
                    if self._due(output.checkpoint_every):
                        self.save(meter)

    def _due(self, every: int) -> bool:
        """Whether what happens every so many steps, 0 for never, and at the end, happens after this one."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.run.steps)

    def save(self, meter: Meter | None = None) -> None:
        """Write a checkpoint of the present step, unless it is the one last written or resumed from."""
        if self._saved_step == self.step:
            return
        if meter is not None:
            self._require_finite(meter.peek())
        tensors, state = run_state.collect(self)
        checkpoints.save(self.folder, self.step, tensors, state, self.config.output.keep)
        self._saved_step = self.step

    def _save_what_there_is(self, error: Exception, meter: Meter) -> None:
        """Save the last whole step, then report a clip or a disk that failed; a checkpoint of no step is none."""
        reason = _in_words(error)
        if self.step == 0:
            raise TrainingError(f"{reason}; nothing was trained yet") from error
        self.save(meter)
        raise TrainingError(
            f"{reason}; step {self.step} is saved in {self.folder}: go on with --resume_from_checkpoint latest"
        ) from error

    def _prepare_folder(self) -> None:
        """Refuse a folder with checkpoints that this run does not continue, write the configuration."""
        checkpoints.remove_leftovers(self.folder)
        there = checkpoints.found(self.folder)
        if there and self._saved_step is None:
            raise CheckpointError(
                f"{self.folder}: already holds {there[-1].name}; go on with --resume_from_checkpoint latest, "
                "or give another folder"
            )
        try:
            with written_aside(self.folder / "config.toml") as temporary:
                temporary.write_text(dump_toml(self.config.to_dict()), encoding="utf-8")
        except OSError as error:
            raise TrainingError(f"{self.folder}: config.toml could not be written: {error}") from error

    def _batches(self) -> Iterator[Batch]:
        """The batches from the present micro-step on; their order is the schedule's, with any number of workers."""
        accumulate = self.config.run.accumulate
        keys = self.schedule.keys(self.step * accumulate, self.config.run.steps * accumulate)
        return clips.loader(self.dataset, keys, self.config.data.workers, self.device)

    def _train_step(self, batches: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward, backward and update for one step; returns its loss and gradient norm, on the device."""
        run, scaler = self.config.run, self.precision.scaler
        total = torch.zeros((), device=self.device)
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(stream_seed(self.config.seed, "dropout", self.step))
            for micro in range(run.accumulate):
                batch = next(batches)
                video = batch["video"].to(self.device, non_blocking=True)
                draws = self.objective.draw(self.step * run.accumulate + micro, video.shape)
                with self.precision.autocast():
                    losses = self.objective.loss(*self.modules.values(), video, batch["caption"], draws)
                loss = losses.mean() / run.accumulate
                scaler.scale(loss).backward()
                total += loss.detach()
        self.optimizer.unscale(scaler)
        norm = nn.utils.clip_grad_norm_(self.optimizer.parameters.values(), self.config.optimizer.max_grad_norm)
        self.optimizer.step(self._next_lr(self.step), scaler)
        self.average.update(self.modules, self.step)
        return total, norm

    def _next_lr(self, step: int) -> float:
        return learning_rate(self.config.optimizer, step, self.config.run.steps)

    def _progress_bar(self) -> tqdm:
        return tqdm(total=self.config.run.steps, initial=self.step, unit="step", desc="train", dynamic_ncols=True)

    def _require_finite(self, values: dict[str, Any]) -> None:
        wrong = [
            f"{name} is {values[name]}"
            for name in ("loss", "grad_norm")
            if values[name] is not None and not math.isfinite(values[name])
        ]
        if self.precision.collapsed():
            wrong.append(f"the fp16 loss scale fell to {self.precision.scaler.get_scale():g}, no gradient is finite")
        if wrong:
            kept = checkpoints.found(self.folder)
            last = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            raise TrainingError(f"step {self.step}: {wrong[0]}; {last}. Try a lower optimizer.lr")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"run.device: expected 'auto', 'cpu', 'cuda' or 'cuda:<n>', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"run.device: {name!r} was asked for, and torch can use no GPU here")
    return device


def _in_words(error: Exception) -> str:
    """The message itself, without the traceback that a worker process puts before it."""
    kind = type(error)
    last = (str(error).strip() or kind.__name__).splitlines()[-1]
    return last.removeprefix(f"{kind.__module__}.").removeprefix(f"{kind.__qualname__}: ")
