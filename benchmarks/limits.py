"""What devices can do, and the shortest time that a case's bytes and operations need on them.

A call can be no faster than its bytes over the memory's rate and its operations over the units' rate allow; the larger
of the two times is its floor.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.traffic import Work

_REACHED = (4.3 / 4.8, 790 / 989.5)  # what one H200 gave of its datasheet: a large copy, a large matrix product


@dataclass(frozen=True)
class Limits:
    """Rates of a device: bytes/s of a large copy (read + written), FLOP/s of the matrix (bf16) and vector (fp32) units.

    `source` says where they come from.
    """

    name: str
    copy: float
    matrix: float
    vector: float
    source: str

    @classmethod
    def of_datasheet(cls, name: str, memory: float, matrix: float, vector: float, source: str) -> Limits:
        """Rates expected from a datasheet (bytes/s, dense bf16, fp32): the shares that an H200 measured."""
        note = f"{source}; times {_REACHED[0]:.2f} and {_REACHED[1]:.2f}, the shares that an H200 measured"
        return cls(name, memory * _REACHED[0], matrix * _REACHED[1], vector, note)


DEVICES = {
    "h200": Limits("H200 SXM", 4.3e12, 790e12, 67e12, "measured: 8.6 GB copy, 8192^3 bf16 product; fp32: datasheet"),
    "h100": Limits.of_datasheet("H100 SXM", 3.35e12, 989.5e12, 67e12, "NVIDIA H100 datasheet"),
    "a100": Limits.of_datasheet("A100 SXM 80GB", 2.039e12, 312e12, 19.5e12, "NVIDIA A100 80GB datasheet"),
    "b200": Limits.of_datasheet("B200 SXM", 7.7e12, 2250e12, 75e12, "NVIDIA HGX B200 datasheet"),
}


@dataclass(frozen=True)
class Floor:
    """The shortest time that the limits allow, in microseconds, and which of them binds ("memory" or "arithmetic")."""

    us: float
    binds: str


def floor(work: Work, limits: Limits, *, least: bool = False) -> Floor:
    """The floor of `work` by the bytes that our kernels move, or by the least that any kernel must."""
    memory = 1e6 * (work.least if least else work.moved) / limits.copy
    arithmetic = 1e6 * work.flops / (limits.matrix * work.rate if work.matrix else limits.vector)
    return Floor(memory, "memory") if memory >= arithmetic else Floor(arithmetic, "arithmetic")


def target(work: Work, target_us: float | None, limits: Limits) -> float | None:
    """A target stated for an H200, in microseconds on a device of these limits: the same share of its floor."""
    return None if target_us is None else target_us * floor(work, limits).us / floor(work, DEVICES["h200"]).us
