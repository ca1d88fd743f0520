"""What the runs found, kept in one JSON file per device and version; later runs add to it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Spread
from fastvdiff import __version__, dispatch, native, verified

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Record = dict[str, Any]
_OF_A_RUN = ("session", "cases")  # what may differ between runs whose results belong together


@dataclass
class OnDevice:
    """What a row of a GPU knows besides its times."""

    bytes_moved: int
    bytes_least: int
    flops: int
    floor_us: float  # by the bytes that our kernel moves and the rates measured in the same run
    binds: str  # "memory" or "arithmetic"
    target_us: float | None
    headline: bool
    checked: str
    warm: dict[str, Spread] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    result_bytes: dict[str, int] = field(default_factory=dict)  # of what a call gives back: its peak less this is extra
    launched: list[str] = field(default_factory=list)  # providers that no graph could capture


@dataclass
class Row:
    """One case: its providers' milliseconds, or what was wrong with it."""

    op: str
    impl: str
    case: str
    correct: bool
    times: dict[str, Spread] = field(default_factory=dict)
    target: float | None = None
    failure: str = ""
    extra: dict[str, float] = field(default_factory=dict)
    device: OnDevice | None = None
    refused: dict[str, str] = field(default_factory=dict)  # of whole networks' providers

    @property
    def speedup(self) -> float:
        """Times faster than eager in the same memory format."""
        return self.times["eager"].median / self.times["fastvdiff"].median

    def record(self) -> Record:
        """The row as the results file has it; milliseconds to six digits."""
        optional = ("device", "refused")
        return _rounded({name: value for name, value in asdict(self).items() if value or name not in optional})


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Recorder:
    """Collects the rows of a session."""

    def __init__(self, budget: float, compiled: bool, folder: Path | None = None) -> None:
        self.budget, self.compile, self.folder = budget, compiled, folder
        self.rows: list[Row] = []
        self.facts = cpu_facts

    @contextlib.contextmanager
    def correct(self, case: Any) -> Iterator[None]:
        """Record a case that fails inside the block as FAILED, and let the failure through."""
        try:
            yield
        except Exception as error:
            self.rows.append(Row(case.op, _impl(case.op), case.name, False, failure=str(error)))
            raise

    def add(
        self, op: str, case: str, times: dict[str, Spread], target: float | None, extra: dict[str, float] | None = None,
        impl: str | None = None,
    ) -> None:  # fmt: skip
        """Record a case that was right, with its times, and what implementation of the op ran if that is known."""
        self.rows.append(Row(op, impl or _impl(op), case, True, times, target, extra=extra or {}))

    def save(self) -> Path | None:
        """Add the session's results to those of this device and version, if they are kept; returns the file."""
        if self.folder is None:
            return None
        return keep({**self.facts(), "cases": [row.record() for row in self.rows]}, self.folder)


def cpu_facts() -> Record:
    """What a CPU's numbers depend on."""
    return {
        "architecture": verified.architecture("cpu"),
        "device": verified.device_name("cpu"),
        "isa": native.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastvdiff": __version__,
        "unit": "milliseconds: lower quartile, median, upper quartile of interleaved rounds",
    }


def keep(record: Record, folder: Path) -> Path:
    """Merge `record` into <folder>/<device>/<version>.json; returns the file, written aside and renamed."""
    file = _file(record, folder)
    if file.is_file():
        record = merged(json.loads(file.read_text()), record)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(_text(record))
    os.replace(aside, file)
    return file


def merged(old: Record, new: Record) -> Record:
    """`old` with every case of `new` in place of its own; only `new` where they come from different surroundings."""
    if _surroundings(old) != _surroundings(new):
        return new
    # A case is measured with all of its implementations at once: what it no longer has goes. Each keeps its place.
    rows: dict[str, list[Record]] = {}
    for record in (old, new):
        here: dict[str, list[Record]] = {}
        for case in record["cases"]:
            here.setdefault(case["case"], []).append(case)
        rows.update(here)
    cases = [case for found in rows.values() for case in found]
    ops = list(dict.fromkeys(case["op"] for case in cases))
    return {**new, "cases": sorted(cases, key=lambda case: ops.index(case["op"]))}


def known(facts: Record, folder: Path) -> set[str]:
    """Cases that are right and measured in the results that a run with these facts would add to."""
    file = _file(facts, folder)
    record = json.loads(file.read_text()) if file.is_file() else {"cases": []}
    if _surroundings(record) != _surroundings(facts):
        return set()
    return {case["case"] for case in record["cases"] if case["correct"]}


def _surroundings(record: Record) -> Record:
    return {name: value for name, value in record.items() if name not in _OF_A_RUN}


def _file(record: Record, folder: Path) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", f"{record['device']} {record.get('isa', '')}".lower()).strip("-")
    return folder / slug / f"{record['fastvdiff']}.json"


def _text(record: Record) -> str:
    """JSON with one case per line: a results file reads, and differs, line by line."""
    *facts, last = json.dumps({**record, "cases": []}, indent=1).splitlines()[:-1]
    cases = ",\n".join(f"  {json.dumps(case)}" for case in record["cases"])
    assert last == ' "cases": []'
    return "\n".join([*facts, ' "cases": [', cases, " ]", "}"]) + "\n"


def _impl(op: str) -> str:
    """The implementation that a float32 call of an op runs here: the first that is not the reference, if any."""
    impls = dispatch.ops().get(op, ())
    return next((impl.name for impl in impls if impl.name == "cpu"), "reference")
