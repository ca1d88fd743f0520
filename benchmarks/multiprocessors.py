"""The multiprocessors of devices, and how many blocks fit one."""

from __future__ import annotations

import math
from dataclasses import dataclass

_RESERVED = 1024  # of shared memory, for each block, by the driver


@dataclass(frozen=True)
class Multiprocessors:
    """How many a device has, and what each offers (CUDA C++ Programming Guide, technical specifications)."""

    count: int
    shared_bytes: int
    architecture: str  # whose code of ours it runs, or the nearest that is built
    hopper: bool = False
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


MULTIPROCESSORS = {
    "h200": Multiprocessors(132, 228 * 1024, "sm_90a", hopper=True),
    "h100": Multiprocessors(132, 228 * 1024, "sm_90a", hopper=True),
    "a100": Multiprocessors(108, 164 * 1024, "sm_80"),
    "b200": Multiprocessors(148, 228 * 1024, "sm_90a"),
}


@dataclass(frozen=True)
class Resources:
    """What one block of a compiled kernel needs."""

    threads: int
    registers: int  # of each thread
    shared_bytes: int

    def blocks(self, device: Multiprocessors) -> int:
        """Blocks on one multiprocessor at once; registers go to warps in units of 256."""
        warps = math.ceil(self.threads / 32)
        of_registers = device.registers // (warps * math.ceil(32 * self.registers / 256) * 256)
        of_shared = device.shared_bytes // (self.shared_bytes + _RESERVED)
        return min(of_registers, of_shared, device.threads // (32 * warps), device.blocks)

    def share(self, device: Multiprocessors) -> float:
        """Of the multiprocessor's warps, those that are there at once."""
        return self.blocks(device) * self.threads / device.threads
