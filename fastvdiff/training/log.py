"""The run's log: JSON lines that agree with the checkpoint a run resumes from, and TensorBoard's event files."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastvdiff.data.atomic import written_aside

from .tensorboard import TensorBoard


class MetricsLog:
    """Appends records to `path`; each holds its `step`.

    At opening, records past `first_step` (of a run that went on after its last checkpoint) and a line that a killed run
    tore are dropped.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= first_step]
            with written_aside(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")


class RunLog:
    """A run's numbers in `log.jsonl`, and with `tensorboard` in event files too, with the clips that it samples."""

    def __init__(self, folder: Path, first_step: int, tensorboard: bool = False) -> None:
        self.metrics = MetricsLog(folder / "log.jsonl", first_step)
        self.tensorboard = TensorBoard(folder / "tensorboard", first_step) if tensorboard else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """One record of numbers."""
        self.metrics.write(step, values)
        if self.tensorboard is not None:
            self.tensorboard.scalars(step, values)

    def clips(self, step: int, clips: Mapping[str, np.ndarray], fps: float) -> None:
        """Sampled clips, uint8 (T, H, W, 3), by name."""
        if self.tensorboard is not None:
            self.tensorboard.clips(step, clips, fps)


def _step(line: str) -> float:
    """The step of a record; infinite for a torn line, which no resumed run keeps."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Meter:
    """Means of loss and gradient norm since the last reading, kept on the device; speed without the pauses.

    clips_per_step: for the rate in clips. With `skips`, steps whose gradient is not finite were left out by the loss
    scaler: they are counted apart and stay out of the means.
    """

    def __init__(self, device: torch.device, clips_per_step: int = 1, skips: bool = False) -> None:
        self.device, self.clips_per_step, self.skips = device, clips_per_step, skips
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(3, device=self.device)
        self._steps, self._away, self._start = 0, 0.0, time.perf_counter()

    def add(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Count one step; nothing waits for the device."""
        values = torch.stack([loss, grad_norm, torch.ones_like(loss)])
        self._sums += torch.where(grad_norm.isfinite(), values, 0) if self.skips else values
        self._steps += 1

    def peek(self) -> dict[str, float | None]:
        """The means so far, None where no step counts; waits for the device."""
        loss, grad_norm, count = self._sums.tolist()
        means = {"loss": loss / count, "grad_norm": grad_norm / count} if count else {"loss": None, "grad_norm": None}
        return {**means, "skipped_steps": self._steps - round(count)} if self.skips else means

    def read(self, lr: float) -> dict[str, float | None]:
        """One log record; the next one starts afresh."""
        values = self.peek()
        rate = self._steps / (time.perf_counter() - self._start - self._away)
        values |= {
            "lr": lr,
            "steps_per_s": rate,
            "clips_per_s": rate * self.clips_per_step,
            "peak_memory_mib": peak_memory_mib(self.device),
        }
        self._reset()
        return values

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count as training."""
        start = time.perf_counter()
        yield
        self._away += time.perf_counter() - start


def peak_memory_mib(device: torch.device) -> float:
    """The most memory in use so far, in MiB: of the allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
