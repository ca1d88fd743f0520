"""About how long the GPU's benchmarks take, to cut a run: `python -m benchmarks.duration`.

Guesses for an H100, not measurements: compilation and cuDNN's search weigh most, then the check in float64. `make gpu
SELECT=...` runs a part, and `--missing` goes on where a run stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from benchmarks.gpu_case import GpuCase
from benchmarks.gpu_cases import CASES
from benchmarks.published import NETWORKS, Network
from benchmarks.targets import covering

LIMIT = 600.0  # of one command
_BUDGET = 0.3  # seconds of racing (benchmarks/conftest.py)
_START = 40.0  # of a session: imports, the device's rates
_EACH = 0.6  # of a case: drawing, graphs, freeing memory
_COMPILED = {None: 0.0, "default": 4.0, "max-autotune-no-cudagraphs": 15.0}
_SEARCHED = 0.7  # for each convolution and format that cuDNN tries its algorithms on
_EXACT_FLOPS, _EXACT_BYTES = 8e12, 1.5e12  # a second, in float64
_PASSES = 12  # over a case's bytes, four times as wide: the check's pieces, norms and differences
_NETWORKS = {"VideoUNet-vdm": (150.0, 240.0), "VideoUNet-latent": (260.0, 40.0)}  # forward, training step
_PUBLISHED = (200.0, 60.0)
# What SELECT may be, each within one command: the goals first, then everything.
SELECTIONS = (
    "goals and not conv3d", "goals and conv3d",
    "group_norm_silu", "temporal_attention and not block", "temporal_attention_block", "geglu", "ddim_step",
    "conv3d and not norm_silu and forward", "conv3d and not norm_silu and training", "norm_silu_conv3d",
    "networks and VideoUNet and forward", "networks and VideoUNet and training",
    "networks and not VideoUNet and forward and not Spatio", "networks and Spatio",
    "networks and not VideoUNet and training and not Spatio",
)  # fmt: skip


def seconds(case: GpuCase | Network) -> float:
    """Of one case, its check included."""
    if isinstance(case, Network):
        known = (both for start, both in _NETWORKS.items() if case.label.startswith(start))
        return next(known, _PUBLISHED)[case.training]
    work = case.work
    check = 2 * (work.flops if work.matrix else 0) / _EXACT_FLOPS + 4 * _PASSES * work.moved / _EXACT_BYTES
    searches = (3 if case.training else 1) * (3 if case.op.endswith("conv3d") else 0)
    return _EACH + check + _COMPILED[case.compile_mode] + searches * _SEARCHED + _BUDGET


def picks(select: str, case: GpuCase | Network) -> bool:
    """Whether pytest's -k, "a and b and not c", takes the case: by its name and its marks."""
    named = f"{case.name} {'networks' if isinstance(case, Network) else ''}"
    named += " goals" if isinstance(case, GpuCase) and covering("cuda", case.op, case.name) else ""
    terms = select.lower().split(" and ")
    return all((term.removeprefix("not ") in named.lower()) != term.startswith("not ") for term in terms)


def total(cases: Iterable[GpuCase | Network]) -> float:
    """Of a session that runs these."""
    return _START + sum(map(seconds, cases))


def main() -> None:
    """Print a line for each selection, and for everything."""
    every = (*CASES, *NETWORKS)
    for select in (*SELECTIONS, ""):
        cases = [case for case in every if picks(select, case)]
        sys.stdout.write(f'SELECT="{select}"'.ljust(66) + f"{len(cases):4} cases, about {total(cases) / 60:4.1f} min\n")


if __name__ == "__main__":
    main()
