"""Which clips a folder holds and what their captions say."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")


class Clip(NamedTuple):
    """A video file, resolved and inside its folder, and its caption."""

    path: Path
    caption: str


def read_captions(root: Path) -> list[Clip]:
    """List the captioned clips of a folder, in the order of its captions file.

    The first of these that is there counts:

    - `captions.jsonl`: one object a line with "file" and "caption" (further fields are ignored);
    - `captions.csv`: a header naming the columns "path" and "caption";
    - a `.txt` file beside each video, of the same stem, anywhere below the folder; sorted by path.

    Raises:
        FileNotFoundError: no such folder, or a clip that a captions file names is not there.
        ValueError: no clips, an entry that is malformed, an empty caption, or a path that leaves the folder (after
            symbolic links). The message names the file and line.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    root = root.resolve()
    for name, read in (("captions.jsonl", _from_jsonl), ("captions.csv", _from_csv)):
        if (root / name).is_file():
            entries, source = read(root / name), root / name
            break
    else:
        entries, source = _from_text_files(root), root
    try:
        clips = [_checked(root, *entry) for entry in entries]
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: captions must be UTF-8 text ({error})") from error
    if not clips:
        raise ValueError(
            f"{source}: holds no clips; expected captions.jsonl, captions.csv, or videos "
            f"({', '.join(VIDEO_SUFFIXES)}) with a .txt caption beside each"
        )
    return clips


def swap_left_right(caption: str) -> str:
    """The caption of the mirrored clip: "left" and "right" (also -ward, -wards) change places, case kept."""
    return re.sub(r"\b(left|right)(?=(?:wards?)?\b)", _other_side, caption, flags=re.IGNORECASE)


def _other_side(match: re.Match[str]) -> str:
    word = match[0]
    other = "right" if word.lower() == "left" else "left"
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


_Entry = tuple[str, object, object]  # where it stands, the path as written, the caption as written


def _from_jsonl(path: Path) -> Iterator[_Entry]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error})") from error
            if not isinstance(fields, dict):
                raise ValueError(f"{where}: expected an object, got {type(fields).__name__}")
            yield where, fields.get("file"), fields.get("caption")


def _from_csv(path: Path) -> Iterator[_Entry]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        missing = {"path", "caption"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: the header has no column {' and no column '.join(sorted(missing))}")
        for row in reader:
            yield f"{path} line {reader.line_num}", row["path"], row["caption"]


def _from_text_files(root: Path) -> Iterator[_Entry]:
    for video in sorted(path for path in root.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES):
        text = video.with_suffix(".txt")
        if not text.is_file():
            raise FileNotFoundError(f"{video}: no caption; expected it in {text.name} beside it")
        yield str(text), str(video.relative_to(root)), text.read_text(encoding="utf-8-sig")


def _checked(root: Path, where: str, file: object, caption: object) -> Clip:
    if not isinstance(file, str) or not file.strip():
        raise ValueError(f"{where}: expected the name of a video, got {file!r}")
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"{where}: the caption of {file} is empty")
    path = (root / file).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{where}: {file} leaves the folder {root}")
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no such file: {path}")
    return Clip(path, " ".join(caption.split()))
