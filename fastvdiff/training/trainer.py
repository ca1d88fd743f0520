"""The training loop: a function of its configuration, so that stopping, resuming and repeating change nothing."""

from __future__ import annotations

import hashlib
import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastvdiff import __version__
from fastvdiff.data import Batch, BatchSchedule, VideoFolder, collate, read_video
from fastvdiff.data.atomic import written_aside
from fastvdiff.models import VideoUNet
from fastvdiff.text import ByteTextEncoder

from . import checkpoints
from .averaged import AveragedModel
from .checkpoints import CheckpointError
from .config import DataConfig, TrainConfig, differing_keys
from .ema import ExponentialAverage
from .interruption import Interruption
from .log import Meter, MetricsLog
from .objective import Objective, stream_seed
from .optimizer import NamedAdamW, learning_rate
from .schema import ConfigError, dump_toml, from_table
from .weights import load_weights, weights_of

OnSamples = Callable[[AveragedModel], None]


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

    on_samples: called with the averaged model every `output.sample_every` steps. say: where messages go.

    Raises ValueError or FileNotFoundError for data that cannot be read.
    """

    def __init__(
        self, config: TrainConfig, *, on_samples: OnSamples | None = None, say: Callable[[str], None] = tqdm.write
    ) -> None:
        self.config, self.on_samples, self.say = config, on_samples, say
        self.folder = Path(config.folder)
        self.device = _device(config.run.device)
        self.dataset = _open_clips(config.data, config.seed)
        self.schedule = BatchSchedule(len(self.dataset), config.run.batch_size, config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "weights", 0))
            unet = VideoUNet(config.model.resolved())
            text_encoder = ByteTextEncoder(config.text.resolved(unet.config.cross_attention_dim))
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
        self.optimizer = NamedAdamW(parameters, config.optimizer)
        self.objective = Objective(config.diffusion, config.seed, self.device)
        self.fps = _frame_rate(self.dataset, config.data)
        self.step = 0
        self._saved_step: int | None = None

    def resume(self, wanted: str = "latest") -> Path | None:
        """Go on from a checkpoint: "latest" in the run's folder (None where there is none yet), a name or a path.

        Raises CheckpointError where it is missing, damaged, or of a run whose network, text, diffusion, seed or data
        differ from this configuration's. Other differences (rates, lengths) are reported and taken as wanted.
        """
        folder = checkpoints.resolve(self.folder, wanted)
        if folder is None:
            return None
        checkpoint = checkpoints.load(folder)
        self._check_same_run(folder, checkpoint.state)
        try:
            for name, module in self.modules.items():
                load_weights(module, checkpoint.tensors[name], f"{name}.safetensors")
                load_weights(self.average.modules[name], checkpoint.tensors[f"ema_{name}"], f"ema_{name}.safetensors")
            self.optimizer.load_state_tensors(checkpoint.tensors["optimizer"])
            self.step = self._saved_step = int(checkpoint.state["step"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{folder}: not a checkpoint of this configuration: {error}") from error
        return folder

    def _check_same_run(self, folder: Path, state: dict[str, Any]) -> None:
        try:
            theirs = from_table(TrainConfig, state["config"], str(folder / checkpoints.STATE))
        except ConfigError as error:
            raise CheckpointError(f"{folder}: written by another version: {error}") from error
        different = differing_keys(theirs, self.config, ("model", "text", "diffusion"))
        different += ["seed"] if theirs.seed != self.config.seed else []
        if different:
            raise CheckpointError(f"{folder}: of another run: {', '.join(different)} differ from this configuration")
        if state["data"] != self._data_hash():
            raise CheckpointError(f"{folder}: of another run: clips or captions in {self.config.data.folder} changed")
        changed = differing_keys(theirs, self.config, ("run", "data", "optimizer"))
        if changed:
            self.say(f"resuming with other values than before for {', '.join(changed)}")
        later = [other.name for other in checkpoints.found(self.folder) if checkpoints.step_of(other) > state["step"]]
        if later:
            self.say(f"{', '.join(later)} will be overwritten when the run comes there again")

    def _data_hash(self) -> str:
        """A hash of which clips there are, in which order, and what they are called."""
        digest = hashlib.sha256()
        for clip in self.dataset.clips:
            relative = clip.path.relative_to(self.dataset.root.resolve()).as_posix()
            digest.update(json.dumps([relative, clip.caption]).encode())
        return digest.hexdigest()

    def _data_description(self) -> dict[str, Any]:
        """What the data set says of itself, in its dataset.json; empty where it says nothing."""
        file = self.dataset.root / "dataset.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def averaged(self) -> AveragedModel:
        """The averaged network and text encoder with what they were trained for."""
        return AveragedModel(self.config, self.step, self.fps, self._data_description(), **self.average.modules)

    def fit(self) -> bool:
        """Train up to `run.steps`; True when they are done, False after an interruption. Either way all is saved.

        Raises TrainingError when the loss is no longer finite, CheckpointError where the folder holds checkpoints and
        `resume` was not called, or the disk refuses one.
        """
        config = self.config
        self._claim_folder()
        log = MetricsLog(self.folder / "log.jsonl", self.step)
        meter = Meter(self.device)
        with Interruption() as interruption, self._progress_bar() as bar:
            batches = self._batches()
            while self.step < config.run.steps and not interruption.requested:
                meter.add(*self._train_step(batches))
                self.step += 1
                bar.update()
                last = self.step == config.run.steps
                if self.step % config.output.log_every == 0 or last:
                    values = meter.read(self._next_lr(self.step - 1))
                    self._require_finite(values)
                    log.write(self.step, values)
                    bar.set_postfix(loss=f"{values['loss']:.4f}")
                with meter.paused():
                    if self.step % config.output.checkpoint_every == 0 or last:
                        self.save(meter)
                    every = config.output.sample_every
                    if self.on_samples is not None and every and (self.step % every == 0 or last):
                        self.on_samples(self.averaged())
        if self.step < config.run.steps:
            self.save(meter)
            self.say(
                f"interrupted: step {self.step} of {config.run.steps} is saved in {self.folder}; "
                "go on with --resume_from_checkpoint latest"
            )
        return self.step >= config.run.steps

    def save(self, meter: Meter | None = None) -> None:
        """Write a checkpoint of the present step, unless it is the one last written or resumed from."""
        if self._saved_step == self.step:
            return
        if meter is not None:
            self._require_finite(meter.peek())
        tensors = {name: weights_of(module) for name, module in self.modules.items()}
        tensors |= {f"ema_{name}": weights_of(module) for name, module in self.average.modules.items()}
        tensors["optimizer"] = self.optimizer.state_tensors()
        state = {
            "version": __version__,
            "config": self.config.to_dict(),
            "data": self._data_hash(),
            "dataset": self._data_description(),
            "fps": self.fps,
        }
        checkpoints.save(self.folder, self.step, tensors, state, self.config.output.keep)
        self._saved_step = self.step

    def _claim_folder(self) -> None:
        """Make the run's folder, refuse one with checkpoints that this run does not continue, write the config."""
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_leftovers(self.folder)
        there = checkpoints.found(self.folder)
        if there and self._saved_step is None:
            raise CheckpointError(
                f"{self.folder}: already holds {there[-1].name}; go on with --resume_from_checkpoint latest, "
                "or give another folder"
            )
        with written_aside(self.folder / "config.toml") as temporary:
            temporary.write_text(dump_toml(self.config.to_dict()), encoding="utf-8")

    def _batches(self) -> Iterator[Batch]:
        """The batches from the present micro-step on; their order is the schedule's, with any number of workers."""
        accumulate, workers = self.config.run.accumulate, self.config.data.workers
        keys = self.schedule.keys(self.step * accumulate, self.config.run.steps * accumulate)
        return iter(
            DataLoader(
                self.dataset,
                batch_sampler=keys,
                collate_fn=collate,
                num_workers=workers,
                worker_init_fn=_ignore_ctrl_c,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),
            )
        )

    def _train_step(self, batches: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward, backward and update for one step; returns its loss and gradient norm, on the device."""
        run = self.config.run
        total = torch.zeros((), device=self.device)
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(stream_seed(self.config.seed, "dropout", self.step))
            for micro in range(run.accumulate):
                batch = next(batches)
                video = batch["video"].to(self.device, non_blocking=True)
                draws = self.objective.draw(self.step * run.accumulate + micro, video.shape)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                    losses = self.objective.loss(*self.modules.values(), video, batch["caption"], draws)
                loss = losses.mean() / run.accumulate
                loss.backward()
                total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.optimizer.parameters.values(), self.config.optimizer.max_grad_norm)
        self.optimizer.step(self._next_lr(self.step))
        self.average.update(self.modules, self.step)
        return total, norm

    def _next_lr(self, step: int) -> float:
        return learning_rate(self.config.optimizer, step, self.config.run.steps)

    def _progress_bar(self) -> tqdm:
        return tqdm(total=self.config.run.steps, initial=self.step, unit="step", desc="train", dynamic_ncols=True)

    def _require_finite(self, values: dict[str, float]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                kept = checkpoints.found(self.folder)
                last = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
                raise TrainingError(f"step {self.step}: {name} is {values[name]}; {last}. Try a lower optimizer.lr")


def _open_clips(config: DataConfig, seed: int) -> VideoFolder:
    return VideoFolder(
        config.folder,
        num_frames=config.num_frames,
        size=(config.height, config.width),
        fps=config.fps,
        seed=seed,
        random_flip=config.random_flip,
        cache=config.cache_mib > 0,
        cache_bytes=config.cache_mib << 20,
        strict=not config.skip_broken,
    )


def _frame_rate(dataset: VideoFolder, config: DataConfig) -> float:
    """Frames per second of the training clips: as configured, else the first clip's own."""
    return config.fps or read_video(dataset.clips[0].path, num_frames=config.num_frames).fps


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


def _ignore_ctrl_c(worker: int) -> None:
    """Leave Ctrl-C to the training process, which finishes its step first and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
