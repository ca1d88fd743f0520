"""The floor of every GPU case on a device, without one: `python -m benchmarks.roofline [--device h200]`."""

from __future__ import annotations

import argparse
import sys

from benchmarks.gpu_cases import CASES
from benchmarks.limits import DEVICES, Limits, floor, target


def table(limits: Limits) -> str:
    """A line per case; the memory formats of a case share one, for they do the same work."""
    lines = [
        f"{limits.name}: copy {limits.copy / 1e12:.2f} TB/s, bf16 {limits.matrix / 1e12:.0f} TFLOP/s ({limits.source})",
        f"{'case':58}{'MB':>8}{'GFLOP':>9}{'FLOP/B':>8}  {'binds':10}{'floor us':>9}{'least us':>9}{'target us':>10}"
        f"{'of floor':>9}",
    ]
    for name, case in {case.workload: case for case in CASES}.items():
        work, lowest = case.work, floor(case.work, limits)
        goal = target(work, case.target_us, limits)
        lines.append(
            f"{name:58}{work.moved / 1e6:8.1f}{work.flops / 1e9:9.1f}{work.intensity:8.1f}  {lowest.binds:10}"
            f"{lowest.us:9.1f}{floor(work, limits, least=True).us:9.1f}"
            + (f"{goal:10.1f}{lowest.us / goal:9.1%}" if goal is not None else "")
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the table of the device that was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=sorted(DEVICES), default="h200")
    sys.stdout.write(table(DEVICES[parser.parse_args(arguments).device]) + "\n")


if __name__ == "__main__":
    main()
