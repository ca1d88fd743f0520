"""Training in a process that is there to be killed, and what it left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what the first step of an optimizer imports

from fastvdiff.training import TrainConfig, Trainer, checkpoints

# Children are forked from a process that has imported all this and computed nothing: they start in milliseconds, and
# none inherits threads that a fork leaves behind.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


def start(config: Path, journal: Path, overrides: tuple[str, ...] = (), resume: str = "latest") -> Any:
    """A process that trains as the file says, from a checkpoint if there is one."""
    process = _context.Process(target=_train, args=(config, journal, overrides, resume))
    process.saves_before = sum("saved" in line for line in noted(journal))
    process.start()
    return process


def warm_up() -> None:
    """Start the process that the others are forked from, and wait until it has imported everything."""
    process = _context.Process(target=os.getpid)
    process.start()
    process.join()


def _train(config: Path, journal: Path, overrides: tuple[str, ...], resume: str) -> None:
    """Train; every acknowledged save and every batch as a line in the journal."""
    output = os.open(journal.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    file = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(**what: Any) -> None:
        os.write(file, (json.dumps(what) + "\n").encode())  # one write: whole, or not there

    trainer = Trainer(TrainConfig.load(config, overrides))
    save, batches = checkpoints.save, trainer._batches

    def save_and_acknowledge(run: Path, step: int, *rest: Any) -> Path:
        folder = save(run, step, *rest)
        note(saved=step)
        return folder

    def noted_batches() -> Any:
        for batch in batches():
            note(step=trainer.step, clips=batch["index"].tolist())
            yield batch

    checkpoints.save, trainer._batches = save_and_acknowledge, noted_batches
    trainer.resume(resume)
    trainer.fit()


def noted(journal: Path) -> list[dict[str, Any]]:
    """The journal's lines."""
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def last_saved(journal: Path) -> int:
    """The newest save that a run acknowledged; -1 where there is none."""
    return max((line["saved"] for line in noted(journal) if "saved" in line), default=-1)


def wait_for_saves(process: Any, journal: Path, count: int, timeout: float = 120) -> None:
    """Until the process has acknowledged so many saves since it was started."""
    deadline = time.monotonic() + timeout
    while sum("saved" in line for line in noted(journal)) < process.saves_before + count:
        assert process.is_alive(), journal.with_suffix(".out").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
