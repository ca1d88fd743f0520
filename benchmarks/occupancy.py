"""How many blocks of each compiled kernel fit a multiprocessor: `python -m benchmarks.occupancy [--select NAME]`.

Needs no GPU. The Triton kernels of every GPU case (or of those with NAME in theirs) are compiled ahead of time as their
launch code asks; a line for each kernel that a case launches: its grid, threads, registers, shared memory, blocks per
multiprocessor and the share of the multiprocessor's warps that they are. The CUDA C++ kernels' registers are read from
the build: a convolution's by the tile and the pass (benchmarks.conv3d_tiles has their waves).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import conv3d_tiles
from benchmarks.gpu_case import Draw, GpuCase
from benchmarks.gpu_cases import CASES
from benchmarks.multiprocessors import MULTIPROCESSORS, Multiprocessors, Resources
from benchmarks.timing import first
from fastvdiff import native
from fastvdiff.native.conv3d_cuda import Plan

_GROUP_NORM_THREADS = {"group_norm_silu_resident": 512}  # 256 of every other


class _Meta(Draw):
    """Draws tensors without memory."""

    def __init__(self) -> None:
        super().__init__("meta", None, torch.bfloat16)  # type: ignore[arg-type]

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")


def cuda_usage(architecture: str) -> dict[str, dict[str, int]]:
    """Mangled name of a kernel in the build -> its registers and static shared memory."""
    from tests.native.test_cuda_objects import Built  # which holds them to what the kernels are cut for

    return Built(Path(str(native.library().__file__)), architecture).usage


def convolution(
    usage: dict[str, dict[str, int]], which: str, by: str, plan: Plan, dtype: torch.dtype, whole: bool,
    prologue: bool = False,
) -> tuple[str, Resources]:  # fmt: skip
    """The kernel of a convolution's pass, and what its blocks need.

    `whole`: channels move in 16-byte accesses; `prologue`: through registers, activated on the way.
    """
    of = {torch.bfloat16: "13__nv_bfloat16", torch.float32: "f"}[dtype]
    name, threads = "conv3d_product_kernel", 256
    ways = f"Li{plan.tile_columns}ELNS0_4LoadE{'2' if prologue else '[01]' if whole else '3'}E"
    if by == "sm90":
        name, threads, ways = "conv3d_sm90_kernel", 384, f"Li{plan.tile_columns}E"
    elif which == "weight_gradient":
        name, ways = "conv3d_weight_gradient_kernel", f"Lb{0 if whole else 1}E"
    found = [used for key, used in usage.items() if re.search(f"{name}I{of}{ways}", key)]
    registers, static = (max(used[what] for used in found) for what in ("REG", "SHARED"))
    return name, Resources(threads, registers, plan.shared_bytes + static)


def launches(case: GpuCase, driver: Any) -> list[tuple[str, tuple[int, int, int], Resources]]:
    """(kernel, grid, resources) of everything that a case launches with impl="triton"; nothing where it declines."""
    driver.launched.clear()
    tensors = case.leaves(case.in_format(case.tensors(_Meta()), case.channels_last))
    try:
        with torch.set_grad_enabled(case.training):
            y = first(case.fast(*tensors, impl="triton"))
    except NotImplementedError:
        return []
    if case.training:
        torch.autograd.grad(y, [t for t in tensors if t.requires_grad], torch.empty_like(y))
    return [(name, grid, driver.resources(key)) for name, grid, key in dict.fromkeys(driver.launched)]


def offline(device: Multiprocessors) -> Any:
    """A driver that compiles and launches nothing, active from here on, with ops that run on tensors without memory."""
    import triton

    from fastvdiff import dispatch
    from fastvdiff.kernels import launch
    from fastvdiff.ops import registration
    from tests.kernels.offline import OfflineDriver, report

    class Noting(OfflineDriver):
        """Notes each launch, of kernels that are compiled already too."""

        def __init__(self, architecture: str) -> None:
            super().__init__(architecture)
            self.launched: list[tuple[str, tuple[int, int, int], str]] = []

        def launcher_cls(self, src: Any, metadata: Any) -> Any:
            checked = super().launcher_cls(src, metadata)

            def noted(x: int, y: int, z: int, *arguments: Any) -> None:
                checked(x, y, z, *arguments)
                self.launched.append((metadata.name, (x, y, z), metadata.hash))

            return noted

        def resources(self, key: str) -> Resources:
            found = report(next(k for k in self.compiled if k.metadata.hash == key))
            return Resources(32 * found["warps"], found["registers"], found["shared"])

    def named(op: str, facts: dispatch.Facts, impl: str | None = None, *, record: bool = True) -> dispatch.Impl:
        chosen = next((i for i in dispatch.ops()[op] if i.name == impl), None)
        reason = chosen and chosen.supports(facts._replace(device="cuda"))
        if chosen is None or reason:
            raise NotImplementedError(f"{op}: {reason}")
        return chosen

    driver = Noting(device.architecture.removesuffix("a"))
    triton.runtime.driver.set_active(driver)
    launch.multiprocessors = lambda x: device.count
    torch.cuda.get_device_capability = lambda *which: (9, 0)  # asked by supports(): any from 8.0 on has these kernels
    torch.is_autocast_enabled = lambda *which: False  # which has no "meta"
    dispatch.choose = named
    registration.below_autograd = lambda op, *args: registration._KERNELS[op](*args)
    return driver


def table(device: Multiprocessors, select: str) -> Iterator[str]:
    """Lines, each as soon as it is known."""
    yield (
        f"{'case':76}{'kernel':42}{'grid':>14}{'threads':>8}{'regs':>6}{'shared':>8}{'blocks/SM':>10}{'warps':>7}"
    )  # fmt: skip
    if native.cuda_architectures():
        yield from _cuda(device, select)
    driver = offline(device)
    for case in CASES:
        if select in case.name and not case.op.endswith("conv3d"):
            yield from _triton(case, driver, device)


def _triton(case: GpuCase, driver: Any, device: Multiprocessors) -> Iterator[str]:
    from triton.runtime.errors import OutOfResources

    try:
        found = launches(case, driver)
    except OutOfResources as error:
        yield f"{case.name:76}DOES NOT FIT: {str(error).partition(' Reducing')[0]}"
        return
    for kernel, grid, resources in found:
        yield _line(case.name, kernel, "x".join(map(str, grid)), resources, device)
    if not found:
        yield f"{case.name:76}Triton declines"


def _cuda(device: Multiprocessors, select: str) -> Iterator[str]:
    usage = cuda_usage(device.architecture)
    for name, used in sorted(usage.items()):
        if "group_norm_silu" in name and "bfloat16" in name and select in f"group_norm_silu {name}":
            threads = next((n for part, n in _GROUP_NORM_THREADS.items() if part in name), 256)
            kernel = name[name.index("group_norm_silu") :].partition("EvNS")[0].replace("I13__nv_bfloat16", " ")
            yield _line(
                "group_norm_silu, impl=cuda", kernel, "", Resources(threads, used["REG"], used["SHARED"]), device
            )
    behind_norms = {case.label for case in CASES if case.op == "norm_silu_conv3d"}
    for conv, dtype in conv3d_tiles.CONVOLUTIONS:
        label = f"conv3d-{conv.label.replace(' ', '-')}" + ("-tf32" if dtype == torch.float32 else "")
        if select not in f"norm_silu_{label}":
            continue
        for (which, by), plan in conv3d_tiles.rows(conv, dtype, device).items():
            whole = conv3d_tiles.in_whole_accesses(conv, which)
            kernel, resources = convolution(usage, which, by, plan, dtype, whole)
            yield _line(f"{label} {which}", kernel, str(plan.blocks), resources, device)
            if (which, by, dtype) == ("forward", "cuda", torch.bfloat16) and conv.label in behind_norms:
                kernel, resources = convolution(usage, which, by, plan, dtype, whole, prologue=True)
                yield _line(f"norm_silu_{label} {which}", kernel, str(plan.blocks), resources, device)


def _line(case: str, kernel: str, grid: str, needs: Resources, device: Multiprocessors) -> str:
    return (
        f"{case:76}{kernel:42}{grid:>14}{needs.threads:8}{needs.registers:6}{needs.shared_bytes:8}"
        f"{needs.blocks(device):10}{needs.share(device):7.0%}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.occupancy", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=sorted(MULTIPROCESSORS), default="h200")
    parser.add_argument("--select", default="", help="cases with this in their name")
    options = parser.parse_args(arguments)
    for line in table(MULTIPROCESSORS[options.device], options.select):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
