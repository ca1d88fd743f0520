"""A CUDA device as a stopwatch: events, graphs, a cold L2, and what the device reaches at its best."""

from __future__ import annotations

import contextlib
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.limits import DEVICES, Limits
from fastvdiff import __version__, verified

FLUSH = "a read of twice the L2 before each sample"
_WARM_UP = 3


class Cuda:
    """What a race needs of the current CUDA device (benchmarks/device_race.py)."""

    def __init__(self) -> None:
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._other = torch.ones(2 * self._properties.L2_cache_size, dtype=torch.uint8, device="cuda").view(torch.int32)
        self._read = torch.empty((), dtype=torch.int32, device="cuda")

    def flush(self, times: int = 1) -> None:
        """Fill the L2 with something else; a few times over gives the host time to queue what follows."""
        for _ in range(times):
            torch.amax(self._other, dim=0, out=self._read)

    def event(self) -> torch.cuda.Event:
        """An event that keeps the device's time."""
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()

    def graph(self, call: Callable[[], Any], times: int = 1) -> Callable[[], None]:
        """`times` calls as one CUDA graph; returns its replay.

        Raises:
            RuntimeError: the call cannot be captured.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                call()
            # A capture that fails may leave allocator and generators behind it: what waits for the host is not tried.
            with _no_synchronisation():
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph.replay

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """The most memory that one call held above what was allocated before it."""
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Give the memory of finished cases back."""
        torch.cuda.empty_cache()

    def end_if_lost(self) -> None:
        """A kernel that wrote where it must not takes the whole CUDA context with it: no later case can be trusted."""
        try:
            self.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the device is lost to this process: {str(error).partition(chr(10))[0]}", returncode=1)

    def _seconds(self, call: Callable[[], Any], samples: int = 20) -> float:
        """Median of cold runs."""
        marks = []
        for _ in range(samples):
            start, end = self.event(), self.event()
            self.flush()
            start.record()
            call()
            end.record()
            marks.append((start, end))
        self.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3

    def limits(self) -> Limits:
        """The rates of a large copy and of a large bf16 product on random data, measured now."""
        count = min(1 << 31, self._properties.total_memory // 16) // 4 * 4
        source = torch.randn(count // 4, device="cuda")
        copy = 2 * count / self._seconds(partial(torch.empty_like(source).copy_, source))
        side = 8192
        a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        matrix = 2 * side**3 / self._seconds(partial(torch.mm, a, b, out=torch.empty_like(a)))
        known = next((d for key, d in DEVICES.items() if key.upper() in verified.device_name("cuda")), DEVICES["h200"])
        return Limits(verified.device_name("cuda"), copy, matrix, known.vector, "measured before the cases")

    def empty_us(self) -> float:
        """What the clock reads for a graph of one tiny kernel: no time below it means anything."""
        one = torch.zeros(1, device="cuda")
        return 1e6 * self._seconds(self.graph(lambda: one.add_(1)))

    def session(self) -> dict[str, Any]:
        """What may change from run to run without making their results another device's."""
        return {"driver": _driver()}

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on, for the results file."""
        p = self._properties
        return {
            "architecture": verified.architecture("cuda"),
            "device": verified.device_name("cuda"),
            "backend": "cuda" if torch.version.hip is None else "rocm",
            "multiprocessors": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size,
            "memory_bytes": p.total_memory,
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "torch": torch.__version__,
            "triton": _triton(),
            "python": platform.python_version(),
            "fastvdiff": __version__,
            "dtype": "bfloat16",
            "flush": FLUSH,
            "unit": "milliseconds of device time: lower quartile, median, upper quartile of interleaved rounds",
        }


@contextlib.contextmanager
def _no_synchronisation() -> Iterator[None]:
    """An operation of torch's that waits for the device raises RuntimeError within the block."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _driver() -> str:
    """The driver's version as nvidia-smi tells it; empty where it is not there."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition("\n")[0].strip()


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__
