"""How conv3d's CUDA kernels fill a device, without one: `python -m benchmarks.conv3d_tiles [--device h200]`.

For each convolution of the GPU's cases, and of the standard shapes with every kernel, and each pass, on the portable
kernels ("cuda") and, for a device of capability 9.0, on the one that it alone has ("sm90"): bytes, operations and floor
as in benchmarks.roofline; the tile and how many there are; how many blocks a multiprocessor holds at once ("a SM"); the
share of the tiles' products that are the convolution's own ("useful": the rest pads channels and positions); and how
full the waves of tiles are, the last one included ("waves"). Their product bounds what any main loop of these tiles can
reach of the device's matrix rate. Needs a build with CUDA kernels, and no GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import torch

from benchmarks import gpu_convolutions
from benchmarks.gpu_convolutions import Convolution
from benchmarks.limits import DEVICES, Limits, floor
from benchmarks.multiprocessors import MULTIPROCESSORS, Multiprocessors
from benchmarks.shapes import ANIMATEDIFF, SVD, VAE, VDM
from fastvdiff import native
from fastvdiff.native import conv3d_cuda, conv3d_cuda_sm90

PASSES = ("forward", "data_gradient", "weight_gradient")
KERNELS = ((1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3))
_RESERVED = 1024  # of shared memory, for each block, by the driver
_TABLE = 3 * 1024  # the kernels' static shared memory, at most
# Every convolution of the GPU's cases, and the levels' with the other kernels.
CONVOLUTIONS = (
    *((Convolution(level, kernel), torch.bfloat16) for level in (*SVD, *ANIMATEDIFF, *VDM, *VAE) for kernel in KERNELS),
    *((conv, torch.bfloat16) for conv in (*gpu_convolutions.ENDS, *gpu_convolutions.STRIDED)),
    *((conv, torch.float32) for conv in gpu_convolutions.TF32),
)


@dataclass(frozen=True)
class Occupancy:
    """How one pass fills a device."""

    plan: conv3d_cuda.Plan
    resident: int  # blocks on the whole device at once
    useful: float
    waves: float


def in_whole_accesses(conv: Convolution, which: str) -> bool:
    """Whether the channels that a pass reads come in 16-byte accesses (of bf16); else it has code of its own."""
    into, out = conv.channels
    read = {"forward": (into,), "data_gradient": (out,), "weight_gradient": (into, out)}[which]
    return all(channels % 8 == 0 for channels in read)


def blocks_by_registers(conv: Convolution, which: str, plan: conv3d_cuda.Plan, dtype: torch.dtype) -> int:
    """Blocks of 256 threads that fit a multiprocessor's registers: two of up to 128 a thread, which some code passes.

    benchmarks.occupancy reads the registers of the build.
    """
    if which == "weight_gradient":
        return 2 if in_whole_accesses(conv, which) and dtype != torch.float32 else 1
    return 2 if in_whole_accesses(conv, which) or plan.tile_columns == 64 else 1


def occupancy(plan: conv3d_cuda.Plan, flops: int, device: Multiprocessors, most: int = 2) -> Occupancy:
    """`most` blocks fit a multiprocessor's registers; shared memory may allow one."""
    per_block = plan.shared_bytes + _TABLE + _RESERVED
    resident = device.count * min(most, device.shared_bytes // per_block)
    products = plan.steps * plan.tile_rows * plan.tile_columns * plan.tile_depth
    waves = plan.blocks / resident
    return Occupancy(plan, resident, flops / (2 * products), waves / math.ceil(waves))


def rows(conv: Convolution, dtype: torch.dtype, device: Multiprocessors) -> dict[tuple[str, str], conv3d_cuda.Plan]:
    """(pass, kernel) of a convolution, zeros around it by half of its kernel."""
    padding = tuple(k // 2 for k in conv.kernel for _ in range(2))
    geometry = conv3d_cuda.Geometry(conv.stride, padding, (1, 1, 1), (False,) * 3)
    call = (conv.level.batch, *conv.channels, conv.level.clip[2:], conv.kernel, geometry, dtype)
    found = {(which, "cuda"): plan for which, plan in conv3d_cuda.plans(*call).items()}
    if device.hopper:
        found |= {(which, "sm90"): plan for which, plan in conv3d_cuda_sm90.plans(*call, device.count).items()}
    return dict(sorted(found.items(), key=lambda row: PASSES.index(row[0][0])))


def table(name: str, limits: Limits) -> str:
    """A line per convolution, pass and kernel."""
    device = MULTIPROCESSORS[name]
    lines = [
        f"{limits.name}: copy {limits.copy / 1e12:.2f} TB/s, bf16 {limits.matrix / 1e12:.0f} TFLOP/s ({limits.source})",
        f"{'case':44}{'pass':16}{'kernel':6}{'MB':>8}{'GFLOP':>9}  {'binds':10}{'floor us':>9}  {'tile':11}{'tiles':>8}"
        f"{'a SM':>5}{'useful':>8}{'waves':>7}{'of rate':>8}",
    ]
    for conv, dtype in CONVOLUTIONS:
        work = conv.work(False, dtype.itemsize)
        lowest = floor(work, limits)
        label = conv.label.replace(" kernel", "") + (" tf32" if dtype == torch.float32 else "")
        for (which, by), plan in rows(conv, dtype, device).items():
            found = occupancy(plan, work.flops, device, blocks_by_registers(conv, which, plan, dtype))
            tile = f"{plan.tile_rows}x{plan.tile_columns}x{plan.tile_depth}"
            lines.append(
                f"{label:44}{which:16}{by:6}{work.moved / 1e6:8.1f}{work.flops / 1e9:9.1f}  {lowest.binds:10}"
                f"{lowest.us:9.1f}  {tile:11}{plan.blocks:8}{found.resident // device.count:5}"
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
