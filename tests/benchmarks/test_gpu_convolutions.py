"""The convolutions measured on a GPU: which there are, what they move, and that a wrong one of each kind is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks import chunked, gpu_convolutions, gpu_run, traffic
from benchmarks.gpu_cases import CASES
from benchmarks.gpu_convolutions import SPACE, Convolution
from benchmarks.limits import DEVICES, floor
from benchmarks.shapes import ANIMATEDIFF, SVD, VAE, VDM
from fastvdiff import ops
from tests.benchmarks.small_cases import LEVEL

NAMES = {case.name for case in CASES}


def test_every_level_has_its_convolutions() -> None:
    kernels = [(level, k) for level in (*SVD, *ANIMATEDIFF, *VDM) for k in ("1x3x3", "3x1x1")]
    for level, kernel in [*kernels, *((level, "3x3x3") for level in VAE)]:
        for what in ("forward", "training"):
            assert f"conv3d-{level.name}-kernel-{kernel}-channels_last-{what}" in NAMES


@pytest.mark.parametrize("op", ["conv3d", "norm_silu_conv3d"])
def test_what_stands_around_a_convolution_is_measured(op: str) -> None:
    labels = {case.workload.removeprefix(f"{op}-svd-l0-kernel-") for case in CASES if case.op == op}
    wanted = {
        "conv3d": {"1x3x3-stats-forward"} | {
            f"{kernel}-{what}-{step}"
            for kernel, what in (
                ("1x3x3", "epilogue"), ("3x1x1", "epilogue"), ("1x3x3", "stats-norm"), ("1x3x3", "tf32"),
                ("1x3x3", "4to320"), ("1x3x3", "320to4"), ("1x3x3", "stride-1x2x2"),
            )
            for step in ("forward", "training")
        },
        "norm_silu_conv3d": {
            f"1x3x3{what}-{step}" for what in ("", "-resnet-block") for step in ("forward", "training")
        },
    }  # fmt: skip
    assert wanted[op] <= labels


def test_cudnn_takes_part_in_both_formats() -> None:
    assert all(case.other_format for case in CASES if case.op.endswith("conv3d"))


def test_first_and_last_layers_have_three_and_four_channels() -> None:
    widths = {c.label.split()[3] for c in CASES if c.op == "conv3d" and "to" in c.label.split()[-1]}
    assert widths == {"4to320", "320to4", "3to64", "64to3", "3to128", "128to3"}
    (first,) = (c for c in CASES if c.name == "conv3d-vdm-l0-kernel-1x7x7-3to64-channels_last-forward")
    positions = 4 * 16 * 64 * 64
    assert first.work.moved == 2 * (3 * positions + 64 * positions + 3 * 64 * 49)
    assert first.work.flops == 2 * positions * 3 * 64 * 49


def test_a_stride_divides_what_is_written() -> None:
    work = traffic.conv3d(2, 8, 8, (5, 8, 8), SPACE, stride=(1, 2, 2))
    assert work.moved == 2 * (2 * 8 * 5 * 64 + 2 * 8 * 5 * 16 + 8 * 8 * 9)
    assert work.flops == 2 * (2 * 5 * 16) * 8 * 8 * 9
    assert traffic.strided((5, 7, 8), (2, 2, 2)) == (3, 4, 4)


def test_tf32_has_half_the_rate() -> None:
    half, whole = (traffic.conv3d(1, 512, 512, (8, 45, 80), (3, 3, 3), size=size) for size in (4, 2))
    assert floor(half, DEVICES["h200"]).us == pytest.approx(2 * floor(whole, DEVICES["h200"]).us)


def test_a_resnet_block_moves_five_tensors() -> None:
    """25T in eager, 5T with prologues and epilogues: two convolutions of 2T and the residual's read."""
    work = traffic.resnet_block(1, 64, (4, 8, 8), SPACE)
    assert work.moved == 5 * (64 * 4 * 8 * 8 * 2) + 2 * (64 * 64 * 9 * 2)
    assert work.least == 2 * (64 * 4 * 8 * 8 * 2) + 2 * (64 * 64 * 9 * 2)


def test_a_norm_that_knows_its_statistics_reads_once() -> None:
    conv = traffic.conv3d(1, 8, 8, (4, 8, 8), SPACE)
    tensor = 8 * 4 * 8 * 8 * 2
    assert traffic.then_norm(conv, tensor, training=False).moved - conv.moved == 2 * tensor
    assert traffic.norm_before(conv, tensor, training=False) == conv
    assert traffic.norm_before(conv, tensor, training=True).moved - conv.moved == 7 * tensor


def test_wrong_statistics_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the convolution's own result, but by that of the norm which they are for."""
    conv3d = ops.conv3d

    def off(*args: Any, **named: Any) -> Any:
        y, stats = conv3d(*args, **named)
        return y, stats * 1.1

    case = gpu_convolutions.before_norm(Convolution(LEVEL, SPACE), False, True)
    chunked.check(case, case.draw("cpu"), "reference")
    monkeypatch.setattr(ops, "conv3d", off)
    with pytest.raises(chunked.Wrong, match="output"):
        chunked.check(case, case.draw("cpu"), "reference")


def test_tf32_is_asked_for_only_within_its_case() -> None:
    def seen(case: Any) -> str:
        asked = []

        def fast(*tensors: torch.Tensor, impl: str) -> torch.Tensor:
            asked.append(torch.backends.cudnn.conv.fp32_precision)
            return case.fast(*tensors, impl=impl)

        spied = dataclasses.replace(case, fast=fast)
        gpu_run.measure(spied, case.draw("cpu"), None, DEVICES["h200"], compiled=False, drive=None)
        return asked[0]

    before = torch.backends.cudnn.conv.fp32_precision
    conv = Convolution(LEVEL, SPACE)
    case = gpu_convolutions.plain(conv, False, True, tf32=True)
    assert seen(case) == "tf32"
    assert case.draw("cpu")[0].dtype == torch.float32
    assert torch.backends.cudnn.conv.fp32_precision == before
    assert seen(gpu_convolutions.plain(conv, False, True)) == before
