"""A GPU's results made up for tests."""

from __future__ import annotations

from typing import Any

from benchmarks.record import OnDevice, Row
from benchmarks.timing import Spread

FACTS = {
    "architecture": "sm_90", "device": "NVIDIA H200", "backend": "cuda", "multiprocessors": 132, "l2_bytes": 62914560,
    "memory_bytes": 150_000_000_000, "cuda": "13.0", "cudnn": 91500, "torch": "2.11.0", "triton": "3.6.0",
    "python": "3.12.3", "fastvdiff": "0.1.0", "dtype": "bfloat16", "flush": "a read of twice the L2",
    "unit": "milliseconds",
}  # fmt: skip
SESSION = {
    "driver": "580.1", "empty_us": 2.1, "copy_bytes_per_second": 4.3e12, "bf16_flop_per_second": 7.9e14,
}  # fmt: skip


def at(us: float) -> Spread:
    return Spread(0.9e-3 * us, 1e-3 * us, 1.1e-3 * us)


def right(case: str, impl: str = "triton", op: str = "temporal_attention", **device: Any) -> Row:
    """A case of 1 MB whose floor is 50 us."""
    times = device.pop("times", {"eager": 400.0, "fastvdiff": 100.0})
    given = {
        "bytes_moved": 215_000_000, "bytes_least": 215_000_000, "flops": 10**9, "floor_us": 50.0, "binds": "memory",
        "target_us": None, "headline": False, "checked": "all elements, 1 piece: output 1e-03 of 2e-03",
        "peak_bytes": dict.fromkeys(times, 10**6), "result_bytes": dict.fromkeys(times, 10**6),
    }  # fmt: skip
    spreads = {name: at(us) for name, us in times.items()}
    return Row(op, impl, case, True, spreads, device=OnDevice(**{**given, **device}))


def network(case: str, times: dict[str, float], op: str = "swap_kernels", refused: dict[str, str] | None = None) -> Row:
    """A whole network's milliseconds; its peaks are ten times as many MB."""
    spreads = {name: at(1e3 * ms) for name, ms in times.items()}
    peaks = {f"peak MB {name}": 10 * ms for name, ms in times.items()}
    return Row(op, "triton", case, True, spreads, 2.0, extra=peaks, refused=refused or {})


def wrong(case: str, impl: str = "triton", op: str = "temporal_attention") -> Row:
    return Row(op, impl, case, False, failure="output: relative error 1.0e+00 > 4.1e-03")


def record(*rows: Row, **facts: Any) -> dict[str, Any]:
    return {**FACTS, "session": SESSION, **facts, "cases": [row.record() for row in rows]}
