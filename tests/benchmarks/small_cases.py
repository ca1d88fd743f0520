"""The GPU's cases at sizes for tests."""

from __future__ import annotations

from benchmarks import gpu_cases
from benchmarks.gpu_case import GpuCase
from benchmarks.shapes import Level

LEVEL = Level("small", 2, 4, 6, 8, 16, 2, 8)


def cases() -> list[GpuCase]:
    made = []
    for training in (False, True):
        made += [
            gpu_cases._group_norm_silu(LEVEL, 4, True, training, True),
            gpu_cases._temporal_attention(LEVEL, True, training, False),
            gpu_cases._block(LEVEL, training, True),
            gpu_cases._conv3d(LEVEL, (3, 1, 1), training, False),
        ]
    return made + [gpu_cases._ddim_step("small", LEVEL.clip, kind) for kind in ("clip", "noise", "threshold")]
