from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_run import write_clips


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten tiny clips."""
    return write_clips(tmp_path_factory.mktemp("data") / "shapes")
