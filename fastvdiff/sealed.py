"""Folders that appear whole or not at all, with the hash of every file in them: checkpoints and saved pipelines.

A folder is written beside its final place, flushed to the disk, and renamed. Its seal, `manifest.json`, holds the size
and the SHA-256 of every file, because neither safetensors nor JSON notices a flipped bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SEAL = "manifest.json"


class DamagedError(ValueError):
    """A file of a sealed folder is missing, truncated or altered; the message names it."""


@contextmanager
def sealed_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `path`; sealed and verified it takes `path`'s name, on failure it is removed.

    ```python
    with sealed_folder("run/checkpoint-00001000") as folder:
        save_file(tensors, folder / "unet.safetensors")
    verify_seal("run/checkpoint-00001000")
    ```

    A folder that is already there is replaced only once the new one is complete. Killed at any moment, `path` is the
    old folder, the new one, or (between two renames) missing with both complete beside it.

    Raises FileNotFoundError where the parent folder does not exist, DamagedError where what was written reads back
    differently (`path` is as before then).
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    aside = path.with_name(f".{path.name}.new-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        _seal(aside)
        verify_seal(aside)
        _take_place(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _take_place(aside: Path, path: Path) -> None:
    """Rename `aside` to `path`; a folder of that name steps back first, and returns if the renaming fails."""
    replaced = path.with_name(f".{path.name}.old-{os.getpid()}")
    there = path.exists()
    if there:
        os.replace(path, replaced)
    try:
        os.replace(aside, path)
    except OSError:
        if there:
            os.replace(replaced, path)
        raise
    _sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def verify_seal(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Check every file of a sealed folder and return the manifest's entries, `{name: {"bytes", "sha256"}}`.

    Raises DamagedError naming the first file that is missing, truncated or altered; a folder without a readable
    manifest counts as damaged.
    """
    folder = Path(folder)
    entries = _read_seal(folder)
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"{file}: missing, although {SEAL} lists it")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise DamagedError(f"{file}: truncated or altered: expected {entry['bytes']:,} bytes, found {size:,}")
        if _sha256(file) != entry["sha256"]:
            raise DamagedError(f"{file}: damaged: its SHA-256 is not the one in {SEAL}")
    return entries


def _read_seal(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / SEAL
    if not file.is_file():
        raise DamagedError(f"{file}: missing: the folder is incomplete, or was not written by fastvdiff")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["files"]
        complete = all({"bytes", "sha256"} <= set(entry) for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{file}: not a readable manifest ({error})") from error
    if not complete:
        raise DamagedError(f"{file}: not a readable manifest (an entry lacks its size or hash)")
    escaping = [name for name in entries if not (folder / name).resolve().is_relative_to(folder.resolve())]
    if escaping:
        raise DamagedError(f"{file}: names a file outside the folder: {escaping[0]!r}")
    return entries


def _seal(folder: Path) -> None:
    """Give every file the folder's ordinary permissions, flush it, and write the manifest last."""
    readable = folder.stat().st_mode & 0o666  # some writers make files that only their owner can read
    entries = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            file.chmod(readable)
            _sync(file)
            entries[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    manifest = folder / SEAL
    manifest.write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")
    _sync(manifest)
    for directory in [*(d for d in folder.rglob("*") if d.is_dir()), folder]:
        _sync(directory)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
