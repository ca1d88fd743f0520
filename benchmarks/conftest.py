"""Options, the device that a session measures, and the table at its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.cuda import Cuda
from benchmarks.limits import Limits
from benchmarks.record import RESULTS, Recorder, cpu_facts, known

_KEY = pytest.StashKey[Recorder]()
_FILES = {
    "cpu": {"test_ops.py", "test_models.py", "test_swap.py", "test_training.py"},
    "cuda": {"test_gpu.py", "test_networks.py"},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """What a session measures, what it may spend, and whether it keeps its results."""
    group = parser.getgroup("fastvdiff")
    group.addoption("--device", choices=sorted(_FILES), help="what to measure (default: cuda if there is one)")
    group.addoption("--budget", type=float, help="seconds of measuring per case (default: 1 on a CPU, 0.3 on a GPU)")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out: it needs a C++ compiler")
    group.addoption("--save-results", action="store_true", help="add to <results>/<device>/<version>.json")
    group.addoption(
        "--missing", action="store_true", help="only cases that are not in the results yet, or are wrong there"
    )
    group.addoption("--results", type=Path, default=RESULTS, help="where results are kept (default: %(default)s)")


def _device(config: pytest.Config) -> str:
    asked = config.getoption("--device")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config: pytest.Config) -> None:
    """One recorder per session."""
    if _device(config) == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: expected a GPU, torch.cuda.is_available() is False")
    budget = config.getoption("--budget") or {"cpu": 1.0, "cuda": 0.3}[_device(config)]
    folder = config.getoption("--results") if config.getoption("--save-results") else None
    config.stash[_KEY] = Recorder(budget, not config.getoption("--no-compile"), folder)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The files of the other kind of device are not collected."""
    others = set().union(*(files for device, files in _FILES.items() if device != _device(config)))
    return True if collection_path.parent == Path(__file__).parent and collection_path.name in others else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --missing, leave out what was measured before."""
    if not config.getoption("--missing"):
        return
    facts = cpu_facts() if _device(config) == "cpu" else Cuda().facts()
    measured = known(facts, RESULTS) | known(facts, config.getoption("--results"))
    names = [getattr(getattr(item, "callspec", None), "params", {}).get("case") for item in items]
    done = [item for item, case in zip(items, names, strict=True) if getattr(case, "name", None) in measured]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item not in done]


@pytest.fixture
def recorder(pytestconfig: pytest.Config) -> Recorder:
    """The session's recorder."""
    return pytestconfig.stash[_KEY]


@pytest.fixture(scope="session")
def gpu(pytestconfig: pytest.Config) -> tuple[Cuda, Limits]:
    """The GPU as a stopwatch, with the rates that it reaches, measured once at the start of the session."""
    device = Cuda()
    limits = device.limits()
    session = {
        **device.session(), "empty_us": device.empty_us(), "copy_bytes_per_second": limits.copy,
        "bf16_flop_per_second": limits.matrix,
    }  # fmt: skip
    pytestconfig.stash[_KEY].facts = lambda: {**device.facts(), "session": session}
    return device, limits


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table; keep it if asked."""
    recorder = config.stash[_KEY]
    if recorder.rows:
        terminalreporter.section("fastvdiff against the others, interleaved medians")
        facts = recorder.facts()
        if "session" in facts:
            terminalreporter.write_line(json.dumps(facts["session"]))
        terminalreporter.write_line(report.text(recorder.rows, facts))
        file = recorder.save()
        if file is not None:
            terminalreporter.write_line(f"kept in {file}")
