"""The run's log: one JSON object a line, always in agreement with the checkpoint that a run resumes from."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastvdiff.data.atomic import written_aside


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


def _step(line: str) -> float:
    """The step of a record; infinite for a torn line, which no resumed run keeps."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Meter:
    """Means of loss and gradient norm since the last reading, kept on the device; speed without the pauses."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(2, device=self.device)
        self._count, self._away, self._start = 0, 0.0, time.perf_counter()

    def add(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Count one step; nothing waits for the device."""
        self._sums += torch.stack([loss, grad_norm])
        self._count += 1

    def peek(self) -> dict[str, float]:
        """The means so far (0 before any step); waits for the device."""
        loss, grad_norm = (self._sums / max(self._count, 1)).tolist()
        return {"loss": loss, "grad_norm": grad_norm}

    def read(self, lr: float) -> dict[str, float]:
        """One log record; the next one starts afresh."""
        values = self.peek()
        seconds = time.perf_counter() - self._start - self._away
        values |= {"lr": lr, "steps_per_s": self._count / seconds, "peak_memory_mib": peak_memory_mib(self.device)}
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
