"""Two calls timed in turn, so that what else the machine does falls on both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def race(first: Callable[[], Any], second: Callable[[], Any], seconds: float, least: int = 5) -> tuple[float, float]:
    """Median milliseconds of both, run in turn for so many seconds and at least `least` times each, after one warm-up.

    On a machine with a GPU every run is waited for.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for call in (first, second):
        call()
    end = time.perf_counter() + seconds
    while len(times[1]) < least or time.perf_counter() < end:
        for call, taken in zip((first, second), times, strict=True):
            _synchronise()
            start = time.perf_counter()
            call()
            _synchronise()
            taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
