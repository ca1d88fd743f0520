"""Launch configurations that `fastvdiff tune` measured on this machine, remembered between processes.

Like the record of `verified`, they hold only for the same device, version and kernels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import verified
from ._version import __version__

Configurations = dict[tuple[str, str], dict[str, Any]]  # (kernel, shape class) -> configuration


def path() -> Path:
    """The file of configurations, in the user's cache folder."""
    return verified.path().with_name("tuned.json")


def load() -> Configurations:
    """What was tuned for the CUDA device here; empty when the record is missing, unreadable or stale."""
    try:
        record = json.loads(path().read_text())
        if record["for"] != _subject():
            return {}
        return {
            (kernel, shape_class): dict(configuration)
            for kernel, classes in record["configurations"].items()
            for shape_class, configuration in classes.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def save(configurations: Configurations) -> Path:
    """Record these configurations beside those tuned earlier for the same device and kernels; returns the file."""
    record: dict[str, dict[str, dict[str, Any]]] = {}
    for (kernel, shape_class), configuration in {**load(), **configurations}.items():
        record.setdefault(kernel, {})[shape_class] = configuration
    verified.replace(path(), {"for": _subject(), "configurations": record})
    return path()


def _subject() -> dict[str, str]:
    """What a configuration was measured on."""
    return {"device": verified.device_name("cuda"), "version": __version__, "kernels": verified.kernel_hash()}
