"""What the results say: the table at the end of a session, the README's tables, the goals, and a page per GPU.

`python -m benchmarks.report` writes the tables from benchmarks/results; `--from FOLDER` first adds the results files
found there (of another machine, or of partial runs).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import gpu_report, target_report
from benchmarks.record import RESULTS, ROOT, Record, Row, keep

PROVIDERS = ("eager", "eager channels_last", "torch.compile", "reference", "fastvdiff")
START, END = "<!-- results: written by python -m benchmarks.report -->", "<!-- end of results -->"


def text(rows: Sequence[Row], facts: Record) -> str:
    """The session's table; `facts` are its device's."""
    width = max((len(row.case) for row in rows), default=4)
    if "backend" in facts:
        return gpu_report.text(rows, width, facts.get("cudnn"))
    head = [f"{'case':{width}}", *(f"{name:>20}" for name in PROVIDERS), "  against eager   target"]
    lines = ["".join(head)]
    for row in rows:
        if not row.correct:
            lines.append(f"{row.case:{width}}  FAILED: {row.failure}")
            continue
        times = (f"{row.times[p].median:17.3f} ms" if p in row.times else " " * 20 for p in PROVIDERS)
        extra = "".join(f"  {name} {value:.2f}" for name, value in row.extra.items())
        lines.append(f"{row.case:{width}}{''.join(times)}  {row.speedup:11.2f}x  {_verdict(row)}{extra}")
    return "\n".join(lines)


def _verdict(row: Row) -> str:
    if row.target is None:
        return ""
    return f"{row.target:.1f}x {'met' if row.speedup >= row.target else 'MISSED'}"


def table(record: Record) -> str:
    """The README's tables of a CPU's results."""
    head = (
        f"{record['device']}, {record['isa']}, {record['threads']} threads, torch {record['torch']}; float32,"
        " medians in milliseconds of interleaved rounds."
    )
    tables = {"swap_kernels": _swap_table, "training": _training_table}
    grouped: dict[str, list[Record]] = {"": [], **{op: [] for op in tables}}
    for case in record["cases"]:
        grouped[case["op"] if case["op"] in tables else ""].append(case)
    parts = [{"": _ops_table, **tables}[op](cases) for op, cases in grouped.items() if cases]
    return "\n\n".join((head, *("\n".join(lines) for lines in parts)))


def _ops_table(cases: Sequence[Record]) -> list[str]:
    lines = [
        "| case | eager | eager channels_last | torch.compile | fastvdiff | against eager | target |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        if not case["correct"]:
            lines.append(f"| {case['case']} | FAILED | | | | | |")
            continue
        median = {name: spread["median"] for name, spread in case["times"].items()}
        shown = [f"{median[p]:.2f}" if p in median else "" for p in PROVIDERS if p != "reference"]
        ratio = median["eager"] / median["fastvdiff"]
        target = "" if case["target"] is None else f"{case['target']:.1f}x"
        lines.append(f"| {case['case']} | {' | '.join(shown)} | {ratio:.2f}x | {target} |")
    return lines


def _swap_table(cases: Sequence[Record]) -> list[str]:
    """Networks before and after swap_kernels: times, and the most memory that the tensors of one run held."""
    lines = [
        "| swapped network | eager | eager channels_last | fastvdiff | against eager | peak memory |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        before, last, after = (case["times"][p]["median"] for p in ("eager", "eager channels_last", "fastvdiff"))
        peaks = " to ".join(f"{case['extra'][f'peak MB {p}']:.0f}" for p in ("eager", "fastvdiff"))
        lines.append(
            f"| {case['case']} | {before:.0f} | {last:.0f} | {after:.0f} | {before / after:.2f}x | {peaks} MB |"
        )
    return lines


def _training_table(cases: Sequence[Record]) -> list[str]:
    """Whole training steps by who made them: how many a second, and the most memory that one of them held."""
    lines = ["| training | steps per second | against eager | peak memory |", "|---|---:|---:|---:|"]
    for case in cases:
        eager = case["times"]["eager"]["median"]
        for provider, spread in case["times"].items():
            rate, ratio = 1e3 / spread["median"], eager / spread["median"]
            peak = case["extra"][f"peak MB {provider}"]
            lines.append(f"| {case['case']}, {provider} | {rate:.2f} | {ratio:.2f}x | {peak:.0f} MB |")
    return lines


def write(results: Path = RESULTS, readme: Path = ROOT / "README.md") -> list[Path]:
    """Put the tables of all results files between the README's markers, and each GPU's own beside its results.

    Returns the files written. A GPU's page stands in its folder; the README shows its headline cases. The machine
    with the most cases comes first. What became of the goals is in docs/targets.md.
    """
    goals = readme.parent / "docs" / "targets.md"
    tables, written = [], [readme, goals]
    records = [(file, json.loads(file.read_text())) for file in sorted(results.rglob("*.json"))]
    for file, record in sorted(records, key=lambda each: -len(each[1]["cases"])):
        if "backend" not in record:
            tables.append(table(record))
            continue
        page = file.parent / "README.md"
        page.write_text(gpu_report.page(record))
        written.append(page)
        tables.append(gpu_report.headline(record, page.relative_to(readme.parent).as_posix()))
    goals.parent.mkdir(exist_ok=True)
    goals.write_text(target_report.page([record for _, record in records]))
    before, _, rest = readme.read_text().partition(START)
    after = rest.partition(END)[2]
    joined = "\n\n".join(tables)
    readme.write_text(f"{before}{START}\n\n{joined}\n\n{END}{after}")
    return written


def main(arguments: list[str] | None = None) -> None:
    """Add results from elsewhere if asked, and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--from", dest="folder", type=Path, help="a folder with results files to add first")
    folder = parser.parse_args(arguments).folder
    if folder is not None:
        found = sorted(folder.rglob("*.json"))
        if not found:
            parser.error(f"--from: expected results files (*.json) in {folder}, found none")
        for file in found:
            sys.stdout.write(f"{keep(json.loads(file.read_text()), RESULTS)}: added\n")
    for file in write():
        sys.stdout.write(f"{file}: tables written\n")


if __name__ == "__main__":
    main()
