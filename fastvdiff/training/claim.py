"""One process at a time trains in a run's folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path

from .checkpoints import CheckpointError

LOCK = ".lock"


@contextlib.contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Hold the run's folder, made if it is not there, for this process; a killed process holds nothing.

    A record lock, which worker processes do not inherit: they may outlive a killed run by seconds. On a file system
    without locks nothing is held.

    Raises CheckpointError where another process holds it, or it cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        stream = (run / LOCK).open("a")
    except OSError as error:
        raise CheckpointError(f"{run}: cannot be written: {error}") from error
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(f"{run}: another process is training in this folder") from error
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        yield
