"""How conv3d's CUDA kernels fill a device, without one: `python -m benchmarks.conv3d_tiles [--device h200]`.

For each standard shape and pass, on the portable kernels ("cuda") and, for a device of capability 9.0, on the one that
it alone has ("sm90"): bytes, operations and floor as in benchmarks.roofline; the tile and how many there are; the share
of the tiles' products that are the convolution's own ("useful": the rest pads channels and positions); and how full the
waves of tiles are, the last one included ("waves"). Their product bounds what any main loop of these tiles can reach of
the device's matrix rate. Needs a build with CUDA kernels, and no GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import torch

from benchmarks import traffic
from benchmarks.limits import DEVICES, Limits, floor
from benchmarks.shapes import ANIMATEDIFF, SVD, VAE, VDM, Level
from fastvdiff import native
from fastvdiff.native import conv3d_cuda, conv3d_cuda_sm90

PASSES = ("forward", "data_gradient", "weight_gradient")
KERNELS = ((1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3))
_RESERVED = 1024  # of shared memory, for each block, by the driver
_TABLE = 3 * 1024  # the kernels' static shared memory, at most


@dataclass(frozen=True)
class Multiprocessors:
    """How many a device has, and the shared memory of each (CUDA C++ Programming Guide, technical specifications)."""

    count: int
    shared_bytes: int
    hopper: bool = False


MULTIPROCESSORS = {
    "h200": Multiprocessors(132, 228 * 1024, hopper=True),
    "h100": Multiprocessors(132, 228 * 1024, hopper=True),
    "a100": Multiprocessors(108, 164 * 1024),
    "b200": Multiprocessors(148, 228 * 1024),
}


@dataclass(frozen=True)
class Occupancy:
    """How one pass fills a device."""

    plan: conv3d_cuda.Plan
    resident: int  # blocks on the whole device at once
    useful: float
    waves: float


def occupancy(plan: conv3d_cuda.Plan, flops: int, device: Multiprocessors) -> Occupancy:
    """Two blocks of 256 threads and 128 registers fit a multiprocessor's registers; shared memory may allow one."""
    per_block = plan.shared_bytes + _TABLE + _RESERVED
    resident = device.count * min(2, device.shared_bytes // per_block)
    products = plan.steps * plan.tile_rows * plan.tile_columns * plan.tile_depth
    waves = plan.blocks / resident
    return Occupancy(plan, resident, flops / (2 * products), waves / math.ceil(waves))


def rows(
    level: Level, kernel: tuple[int, int, int], dtype: torch.dtype, device: Multiprocessors
) -> dict[tuple[str, str], conv3d_cuda.Plan]:
    """(pass, kernel) of a level's convolution, as many channels out as in, padded to the same size."""
    padding = tuple(k // 2 for k in kernel for _ in range(2))
    geometry = conv3d_cuda.Geometry((1, 1, 1), padding, (1, 1, 1), (False,) * 3)
    call = (level.batch, level.channels, level.channels, level.clip[2:], kernel, geometry, dtype)
    found = {(which, "cuda"): plan for which, plan in conv3d_cuda.plans(*call).items()}
    if device.hopper:
        found |= {(which, "sm90"): plan for which, plan in conv3d_cuda_sm90.plans(*call, device.count).items()}
    return dict(sorted(found.items(), key=lambda row: PASSES.index(row[0][0])))


def table(name: str, limits: Limits) -> str:
    """A line per level, kernel and pass, in bf16."""
    device = MULTIPROCESSORS[name]
    lines = [
        f"{limits.name}: copy {limits.copy / 1e12:.2f} TB/s, bf16 {limits.matrix / 1e12:.0f} TFLOP/s ({limits.source})",
        f"{'case':34}{'pass':16}{'kernel':6}{'MB':>8}{'GFLOP':>9}  {'binds':10}{'floor us':>9}  {'tile':11}{'tiles':>8}"
        f"{'useful':>8}{'waves':>7}{'of rate':>8}",
    ]
    for level in (*SVD, *ANIMATEDIFF, *VDM, *VAE):
        for kernel in KERNELS:
            work = traffic.conv3d(level.batch, level.channels, level.channels, level.clip[2:], kernel)
            lowest = floor(work, limits)
            for (which, by), plan in rows(level, kernel, torch.bfloat16, device).items():
                found = occupancy(plan, work.flops, device)
                tile = f"{plan.tile_rows}x{plan.tile_columns}x{plan.tile_depth}"
                lines.append(
                    f"{level.name + ' ' + 'x'.join(map(str, kernel)):34}{which:16}{by:6}{work.moved / 1e6:8.1f}"
                    f"{work.flops / 1e9:9.1f}  {lowest.binds:10}{lowest.us:9.1f}  {tile:11}{plan.blocks:8}"
                    f"{found.useful:8.1%}{found.waves:7.1%}{found.useful * found.waves:8.1%}"
                )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the table of the device that was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conv3d_tiles", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=sorted(MULTIPROCESSORS), default="h200")
    name = parser.parse_args(arguments).device
    if not native.cuda_architectures():
        parser.error("this build has no CUDA kernels: with nvcc on the path, FASTVDIFF_CUDA=ON pip install -e .")
    sys.stdout.write(table(name, DEVICES[name]) + "\n")


if __name__ == "__main__":
    main()
