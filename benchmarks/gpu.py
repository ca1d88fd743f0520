"""Everything that needs a GPU, in stages that can be run one by one: `python -m benchmarks.gpu [stage ...]`.

A stage that fails does not keep the others from running; the exit status tells. Benchmark results are added to those
already there, case by case, so that a run may end at any time: `--missing` goes on where it stopped, and `--select`
(pytest's -k) names a part.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.record import RESULTS, ROOT

_SANITIZERS = ("memcheck", "initcheck", "synccheck")
# Graphs need the allocator that the tools run without. Kernels that run only where they are named are in: their tests
# name them.
_SMALL = "not large and not graph"
STAGES = ("build", "tests", *_SANITIZERS, "bench")


@dataclass(frozen=True)
class Stage:
    """A command with what it needs: a program on the PATH, and environment variables of its own."""

    name: str
    command: list[str]
    program: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage went: "passed", "failed (3)" or "skipped: ..."."""

    stage: str
    what: str
    seconds: float


def stages(names: Sequence[str], results: Path, select: str, sanitize: str, missing: bool) -> list[Stage]:
    """The stages of these names, in order."""
    python = [sys.executable, "-m"]
    bare = ["--no-build-isolation", "--no-deps"] if os.environ.get("FASTVDIFF_NO_ISOLATION") else []
    chosen = ["-k", select] if select else []
    tests = [*python, "pytest", "-m", "gpu", "-q"]
    known = {
        "build": Stage("build", [*python, "pip", "install", "--disable-pip-version-check", *bare, "-e", "."]),
        "tests": Stage("tests", [*tests, "--durations=15"]),
        # Tools find more where every tensor is an allocation of its own.
        **{
            tool: Stage(
                tool,
                ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", "99",
                 *tests, "-k", sanitize],
                program="compute-sanitizer", environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for tool in _SANITIZERS
        },
        "bench": Stage(
            "bench",
            [*python, "pytest", "benchmarks", "--benchmark-only", "--benchmark-quiet", "--device", "cuda", "-q",
             "--save-results", "--results", str(results), *chosen, *(["--missing"] if missing else [])],
        ),
    }  # fmt: skip
    return [known[name] for name in names]


def run(stage: Stage, logs: Path) -> Outcome:
    """Run a stage; what it says goes to the terminal and to <logs>/<stage>.log."""
    start = time.perf_counter()
    if stage.program and shutil.which(stage.program) is None:
        return Outcome(stage.name, f"skipped: {stage.program} is not on the PATH", 0.0)
    logs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **stage.environment, "PYTHONUNBUFFERED": "1"}
    with (
        open(logs / f"{stage.name}.log", "w", buffering=1) as log,
        subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, text=True, errors="replace", stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):  # fmt: skip
        for line in process.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            log.write(line)
    what = "passed" if process.returncode == 0 else f"failed ({process.returncode})"
    return Outcome(stage.name, what, time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages asked for, say how each went, and return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)}; default: all, in order")
    parser.add_argument("--results", type=Path, default=RESULTS, help="for results and logs (default: %(default)s)")
    parser.add_argument("--select", default="", help="the benchmarks to run, as pytest's -k")
    parser.add_argument("--missing", action="store_true", help="benchmarks that the results do not have yet")
    parser.add_argument("--sanitize", default=_SMALL, help="the tests under compute-sanitizer, as pytest's -k")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"expected stages among {', '.join(STAGES)}, got {', '.join(unknown)}")
    results = options.results.resolve()
    outcomes = []
    for stage in stages(options.stages or STAGES, results, options.select, options.sanitize, options.missing):
        sys.stdout.write(f"\n== {stage.name}: {shlex.join(stage.command)}\n")
        outcomes.append(run(stage, results / "logs"))
    sys.stdout.write("\n")
    for outcome in outcomes:
        sys.stdout.write(f"{outcome.stage:10} {outcome.seconds:8.1f} s  {outcome.what}\n")
    return int(any(outcome.what.startswith("failed") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
