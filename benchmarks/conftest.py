"""Options and the table at the end of a benchmark session."""

from __future__ import annotations

import pytest

from benchmarks.report import Recorder

_KEY = pytest.StashKey[Recorder]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What a session may spend, and whether it keeps its results."""
    group = parser.getgroup("fastvdiff")
    group.addoption("--budget", type=float, default=1.0, help="seconds of measuring per case")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out: it needs a C++ compiler")
    group.addoption("--save-results", action="store_true", help="write benchmarks/results/<device>/<version>.json")


def pytest_configure(config: pytest.Config) -> None:
    """One recorder per session."""
    config.stash[_KEY] = Recorder(config.getoption("--budget"), not config.getoption("--no-compile"))


@pytest.fixture
def recorder(pytestconfig: pytest.Config) -> Recorder:
    """The session's recorder."""
    return pytestconfig.stash[_KEY]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table; keep it if asked."""
    recorder = config.stash[_KEY]
    if recorder.rows:
        terminalreporter.section("fastvdiff against eager, interleaved medians")
        terminalreporter.write_line(recorder.text())
        if config.getoption("--save-results"):
            terminalreporter.write_line(f"kept in {recorder.save()}")
