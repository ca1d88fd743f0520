"""Sealed folders: whole or not at all, and every kind of damage is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastvdiff.sealed import SEAL, DamagedError, sealed_folder, verify_seal


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    with sealed_folder(tmp_path / "kept") as folder:
        (folder / "a.bin").write_bytes(bytes(range(256)) * 8)
        (folder / "inner").mkdir()
        (folder / "inner" / "b.json").write_text("{}")
    return tmp_path / "kept"


def test_intact_folder_verifies(sealed: Path) -> None:
    assert set(verify_seal(sealed)) == {"a.bin", "inner/b.json"}
    assert [path.name for path in sealed.parent.iterdir()] == ["kept"]


def test_files_are_as_readable_as_their_folder(sealed: Path) -> None:
    (sealed / "a.bin").chmod(0o600)
    with sealed_folder(sealed.parent / "other") as folder:
        (folder / "private").write_text("x")
        (folder / "private").chmod(0o600)
    assert (sealed.parent / "other" / "private").stat().st_mode & 0o777 == sealed.stat().st_mode & 0o666


@pytest.mark.parametrize("position", [0, 1000, 2047])
def test_every_flipped_bit_is_found(sealed: Path, position: int) -> None:
    data = bytearray((sealed / "a.bin").read_bytes())
    data[position] ^= 1
    (sealed / "a.bin").write_bytes(data)
    with pytest.raises(DamagedError, match=r"a\.bin: damaged: its SHA-256 is not the one in manifest\.json"):
        verify_seal(sealed)


def test_truncated_missing_and_unreadable(sealed: Path) -> None:
    os.truncate(sealed / "a.bin", 100)
    with pytest.raises(DamagedError, match=r"a\.bin: truncated or altered: expected 2,048 bytes, found 100"):
        verify_seal(sealed)
    (sealed / "a.bin").unlink()
    with pytest.raises(DamagedError, match=r"a\.bin: missing, although manifest\.json lists it"):
        verify_seal(sealed)
    for text in ("", "{", "[]", '{"files": {"a.bin": {}}}', '{"files": 3}'):
        (sealed / SEAL).write_text(text)
        with pytest.raises(DamagedError, match=r"manifest\.json: not a readable manifest"):
            verify_seal(sealed)
    (sealed / SEAL).unlink()
    with pytest.raises(DamagedError, match=r"manifest\.json: missing: the folder is incomplete"):
        verify_seal(sealed)


def test_manifest_cannot_name_files_elsewhere(sealed: Path) -> None:
    (sealed / SEAL).write_text('{"files": {"../outside": {"bytes": 1, "sha256": ""}}}')
    with pytest.raises(DamagedError, match=r"names a file outside the folder: '\.\./outside'"):
        verify_seal(sealed)


def test_failed_writer_leaves_the_old_folder(sealed: Path) -> None:
    def write_half() -> None:
        with sealed_folder(sealed) as folder:
            (folder / "a.bin").write_bytes(b"half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write_half()
    assert set(verify_seal(sealed)) == {"a.bin", "inner/b.json"}
    assert [path.name for path in sealed.parent.iterdir()] == ["kept"]


def test_failed_rename_puts_the_old_folder_back(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if ".new-" in str(source):
            raise OSError("no space")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no space"), sealed_folder(sealed) as folder:
        (folder / "c").write_text("new")
    assert set(verify_seal(sealed)) == {"a.bin", "inner/b.json"}


def test_replaces_a_complete_folder(sealed: Path) -> None:
    with sealed_folder(sealed) as folder:
        (folder / "c").write_text("new")
    assert set(verify_seal(sealed)) == {"c"}
    assert [path.name for path in sealed.parent.iterdir()] == ["kept"]


def test_parent_must_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"), sealed_folder(tmp_path / "nowhere" / "x"):
        pass
