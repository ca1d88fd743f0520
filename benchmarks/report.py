"""What the runs found: a table at the end of the session, a JSON file per device, and the README's tables."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Spread
from fastvdiff import __version__, dispatch, native, verified

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PROVIDERS = ("eager", "eager channels_last", "torch.compile", "reference", "fastvdiff")


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

    @property
    def speedup(self) -> float:
        """Times faster than eager in the same memory format."""
        return self.times["eager"].median / self.times["fastvdiff"].median


class Recorder:
    """Collects the rows of a session."""

    def __init__(self, budget: float, compiled: bool) -> None:
        self.budget, self.compile = budget, compiled
        self.rows: list[Row] = []

    @contextlib.contextmanager
    def correct(self, case: Any) -> Iterator[None]:
        """Record a case that fails inside the block as FAILED, and let the failure through."""
        try:
            yield
        except Exception as error:
            self.rows.append(Row(case.op, _impl(case.op), case.name, False, failure=str(error)))
            raise

    def add(
        self, op: str, case: str, times: dict[str, Spread], target: float | None, extra: dict[str, float] | None = None
    ) -> None:
        """Record a case that was right, with its times."""
        self.rows.append(Row(op, _impl(op), case, True, times, target, extra=extra or {}))

    def text(self) -> str:
        """The session's table."""
        width = max((len(row.case) for row in self.rows), default=4)
        head = [f"{'case':{width}}", *(f"{name:>20}" for name in PROVIDERS), "  against eager   target"]
        lines = ["".join(head)]
        for row in self.rows:
            if not row.correct:
                lines.append(f"{row.case:{width}}  FAILED: {row.failure}")
                continue
            times = (f"{row.times[p].median:17.3f} ms" if p in row.times else " " * 20 for p in PROVIDERS)
            extra = "".join(f"  {name} {value:.2f}" for name, value in row.extra.items())
            lines.append(f"{row.case:{width}}{''.join(times)}  {row.speedup:11.2f}x  {_verdict(row)}{extra}")
        return "\n".join(lines)

    def save(self) -> Path:
        """Write the results of this device and version; returns the file."""
        device = re.sub(r"[^a-z0-9]+", "-", f"{verified.device_name('cpu')} {native.isa()}".lower()).strip("-")
        file = RESULTS / device / f"{__version__}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "architecture": verified.architecture("cpu"),
            "device": verified.device_name("cpu"),
            "isa": native.isa(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "fastvdiff": __version__,
            "unit": "milliseconds: lower quartile, median, upper quartile of interleaved rounds",
            "cases": [asdict(row) for row in self.rows],
        }
        file.write_text(json.dumps(record, indent=1) + "\n")
        return file


def _impl(op: str) -> str:
    """The implementation that a float32 call of an op runs here: the first that is not the reference, if any."""
    impls = dispatch.ops().get(op, ())
    return next((impl.name for impl in impls if impl.name == "cpu"), "reference")


def _verdict(row: Row) -> str:
    if row.target is None:
        return ""
    return f"{row.target:.1f}x {'met' if row.speedup >= row.target else 'MISSED'}"


def table(file: Path) -> str:
    """The README's table of one results file."""
    record = json.loads(file.read_text())
    lines = [
        f"{record['device']}, {record['isa']}, {record['threads']} threads, torch {record['torch']}; float32,"
        " medians in milliseconds of interleaved rounds.",
        "",
        "| case | eager | eager channels_last | torch.compile | fastvdiff | against eager | target |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in record["cases"]:
        if not case["correct"]:
            lines.append(f"| {case['case']} | FAILED | | | | | |")
            continue
        median = {name: spread["median"] for name, spread in case["times"].items()}
        shown = [f"{median[p]:.2f}" if p in median else "" for p in PROVIDERS if p != "reference"]
        ratio = median["eager"] / median["fastvdiff"]
        target = "" if case["target"] is None else f"{case['target']:.1f}x"
        lines.append(f"| {case['case']} | {' | '.join(shown)} | {ratio:.2f}x | {target} |")
    return "\n".join(lines)


def update_readme() -> None:
    """Put the tables of all results files between the README's markers."""
    readme = ROOT / "README.md"
    tables = "\n\n".join(table(file) for file in sorted(RESULTS.rglob("*.json")))
    start, end = "<!-- results: written by python -m benchmarks.report -->", "<!-- end of results -->"
    before, _, rest = readme.read_text().partition(start)
    _, _, after = rest.partition(end)
    readme.write_text(f"{before}{start}\n\n{tables}\n\n{end}{after}")


if __name__ == "__main__":
    update_readme()
    sys.stdout.write("README.md: tables written\n")
