"""The parts that a GPU run is cut into: each within one command, together everything."""

from __future__ import annotations

import subprocess
import sys

from benchmarks import duration
from benchmarks.gpu_cases import CASES
from benchmarks.published import NETWORKS
from benchmarks.record import ROOT

EVERY = (*CASES, *NETWORKS)


def chosen(select: str) -> set[str]:
    return {case.name for case in EVERY if duration.picks(select, case)}


def test_each_part_fits_one_command() -> None:
    for select in duration.SELECTIONS:
        cases = [case for case in EVERY if duration.picks(select, case)]
        assert cases, select
        assert duration.total(cases) < duration.LIMIT, select


def test_the_parts_are_everything() -> None:
    assert set().union(*(chosen(select) for select in duration.SELECTIONS[2:])) == {case.name for case in EVERY}


def test_pytest_chooses_the_same() -> None:
    """On a device that is not there: the collection asks whether it is."""
    selects = ("goals and not conv3d", "networks and Spatio", "conv3d and not norm_silu and training")
    program = "import sys, torch, pytest; torch.cuda.is_available = lambda: True; pytest.main(sys.argv[1:])"
    for select in selects:
        options = ["benchmarks", "--collect-only", "-q", "--device", "cuda", "-p", "no:cacheprovider", "-k", select]
        command = [sys.executable, "-c", program, *options]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert {line.partition("[")[2][:-1] for line in said.splitlines() if "::" in line} == chosen(select)
