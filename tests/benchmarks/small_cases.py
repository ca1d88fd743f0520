"""The GPU's cases at sizes for tests."""

from __future__ import annotations

from benchmarks import gpu_cases, gpu_convolutions
from benchmarks.gpu_case import GpuCase
from benchmarks.gpu_convolutions import SPACE, TIME, Convolution
from benchmarks.shapes import Level

LEVEL = Level("small", 2, 4, 6, 8, 16, 2, 8)


def cases() -> list[GpuCase]:
    made = []
    for training in (False, True):
        made += [
            gpu_cases._group_norm_silu(LEVEL, 4, True, training, True),
            gpu_cases._temporal_attention(LEVEL, True, training, False),
            gpu_cases._block(LEVEL, training, True),
            gpu_convolutions.plain(Convolution(LEVEL, TIME), training, False),
            gpu_convolutions.plain(Convolution(LEVEL, SPACE, channels_in=4, stride=(1, 2, 2)), training, True),
            gpu_convolutions.plain(Convolution(LEVEL, SPACE, channels_out=3), training, True, tf32=True),
            *(
                make(Convolution(LEVEL, SPACE), training, True)
                for make in (
                    gpu_convolutions.epilogue,
                    gpu_convolutions.before_norm,
                    gpu_convolutions.after_norm,
                    gpu_convolutions.resnet_block,
                )
            ),
        ]
    made.append(gpu_convolutions.statistics(Convolution(LEVEL, SPACE), False, True))
    made += [gpu_cases._geglu(LEVEL, training, False) for training in (False, True)]
    return made + [gpu_cases._ddim_step("small", LEVEL.clip, kind) for kind in ("clip", "noise", "threshold")]
