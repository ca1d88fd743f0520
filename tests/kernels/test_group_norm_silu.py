"""group_norm_silu's Triton kernels: against the reference, in both ways of cutting the work, and tile by tile."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvdiff.kernels import (
    group_moments,
    group_norm_silu_backward,
    group_norm_silu_terms,
    group_norm_silu_whole,
    launch,
)
from fastvdiff.kernels import group_norm_silu as kernels
from fastvdiff.ops import group_norm_silu
from tests.ops.drawn_group_norm_silu import DTYPES, FEW_CHANNELS, calls, check, in_layout, parameters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"BLOCK": 64, "SEGMENT": 32, "PROGRAMS": 2, "num_warps": 1, "num_stages": 2}
FORMATS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@contextmanager
def two_passes(multiprocessors: int = 1) -> Iterator[None]:
    """Within the block every call takes the kernels of large tensors, on a device of so many multiprocessors."""
    with (
        mock.patch.object(kernels, "whole", return_value=None),
        mock.patch.object(group_norm_silu_backward, "whole", return_value=None),
        mock.patch.object(launch, "multiprocessors", return_value=multiprocessors),
    ):
        yield


@contextmanager
def tiles(configuration: dict[str, Any]) -> Iterator[None]:
    """Within the block every pass that streams takes this configuration."""
    with mock.patch.object(launch, "configuration", return_value=configuration):
        yield


@settings(max_examples=160)
@given(calls(batch=2, extent=6, device=DEVICE))
def test_whole_groups_in_a_program(call: tuple[torch.Tensor, int, dict[str, Any]]) -> None:
    x, groups, arguments = call
    with mock.patch.object(launch, "multiprocessors", return_value=1):
        check(x, groups, "triton", **arguments)


@settings(max_examples=80)
@given(calls(batch=2, extent=6, device=DEVICE), st.integers(1, 2))
def test_two_passes(call: tuple[torch.Tensor, int, dict[str, Any]], multiprocessors: int) -> None:
    x, groups, arguments = call
    with two_passes(multiprocessors):
        check(x, groups, "triton", **arguments)


@settings(max_examples=60)
@given(calls(batch=2, extent=4, device=DEVICE))
def test_two_passes_in_small_tiles(call: tuple[torch.Tensor, int, dict[str, Any]]) -> None:
    """Several blocks for a program, several programs for a column, columns that end within a group."""
    x, groups, arguments = call
    with two_passes(), tiles(SMALL):
        check(x, groups, "triton", **arguments)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("channels", "groups"), FEW_CHANNELS)
def test_few_channels(channels: int, groups: int, passes: int, device: str) -> None:
    layout, dtype = ("contiguous", "channels_last")[channels % 2], DTYPES[(channels + passes) % 3]
    x = in_layout(layout, 2, channels, 2, 5, 7, dtype=dtype, device=device)
    with two_passes() if passes == 2 else contextlib.nullcontext():
        check(x, groups, "triton", **parameters(x, "mixed"))


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_channels(dtype: torch.dtype, layout: str, device: str) -> None:
    x = in_layout(layout, 1, 320, 2, 2, 3, dtype=dtype, device=device)
    with two_passes():
        check(x, 32, "triton", **parameters(x, "mixed_other"))


@FORMATS
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_mixed_parameter_dtypes(parameter_dtype: torch.dtype, layout: str, device: str) -> None:
    x = in_layout(layout, 2, 16, 3, 4, 5, dtype=torch.float16, device=device)
    check(x, 4, "triton", **parameters(x, "sample", parameter_dtype))
    with two_passes():
        check(x, 4, "triton", **parameters(x, "frame", parameter_dtype))


@FORMATS
def test_chunks_of_a_wider_projection(layout: str, device: str) -> None:
    """scale and shift as modules have them: halves of one row, a stride between the samples."""
    x = in_layout(layout, 2, 8, 3, 4, 5, device=device)
    scale, shift = torch.randn(2, 16, device=device).chunk(2, dim=1)
    for route in (launch.on_device(x), two_passes()):
        with route:
            check(x, 4, "triton", scale=scale.detach().requires_grad_(), shift=shift.detach().requires_grad_())


@FORMATS
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_large_mean(mean: float, layout: str, device: str) -> None:
    x = in_layout(layout, 2, 16, 4, 12, 12, device=device) + mean
    normal = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 4)).float()
    for route in (launch.on_device(x), two_passes()):
        with route:
            y = check(x.detach(), 4, "triton")
        assert (y - normal).abs().max() < 1e-7 * mean + 1e-5


@FORMATS
def test_outlier_first(layout: str, device: str) -> None:
    """A first value far from all others: sums around it alone would cancel."""
    x = in_layout(layout, 1, 16, 4, 12, 12, device=device)
    x[:, :, 0, 0, 0] = 1e4
    for route in (launch.on_device(x), two_passes()):
        with route:
            check(x.detach(), 4, "triton")


@FORMATS
def test_statistics_given(layout: str, device: str) -> None:
    x = in_layout(layout, 2, 24, 2, 6, 7, device=device)
    grouped = x.double().reshape(2, 4, -1)
    mean = grouped.mean(-1)
    stats = torch.stack([mean, (grouped - mean[..., None]).square().sum(-1)], -1).float()
    check(x, 4, "triton", stats=stats, **parameters(x, "sample"))
    check(x.detach(), 4, "triton", stats=stats.mT.contiguous().mT, **parameters(x, "frame"))
    with mock.patch.object(kernels, "group_norm_silu_stats_kernel", None):
        group_norm_silu(x, 4, stats=stats, impl="triton")


@pytest.mark.parametrize("shape", [(0, 8, 2, 3, 3), (2, 8, 0, 3, 3)], ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(shape, device=device).requires_grad_()
    leaves = {"x": x, **parameters(x, "sample")}
    y = group_norm_silu(num_groups=4, impl="triton", **leaves)
    assert y.shape == x.shape
    for name, grad in zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True):
        assert grad.shape == leaves[name].shape
        assert not grad.any()


@FORMATS
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_non_finite_stays_in_its_group(value: float, layout: str, device: str) -> None:
    x = in_layout(layout, 2, 16, 3, 5, 7, device=device)
    x[1, 5, 1, 2, 3] = value
    bad = torch.zeros(2, 16, dtype=torch.bool)
    bad[1, 4:8] = True
    for route in (launch.on_device(x), two_passes()):
        with route:
            leaf = x.detach().requires_grad_()
            y = group_norm_silu(leaf, 4, impl="triton")
            y.sum().backward()
        for result in (y, leaf.grad):
            assert torch.isfinite(result[~bad]).all()
            assert torch.isnan(result[bad]).all()


@FORMATS
def test_activation_at_the_ends(layout: str, device: str) -> None:
    ends = [math.inf, -math.inf, math.nan, 1e30, -1e30, 88.5, -88.5, -200.0, 200.0, 0.0, -1e-30]
    ends = torch.tensor([ends], device=device)
    x = in_layout(layout, 1, ends.shape[1], 2, 3, 3, device=device)
    zero = torch.zeros(ends.shape[1], device=device)
    y = group_norm_silu(x, 1, zero, zero, shift=ends, impl="triton")
    expected = torch.nn.functional.silu(ends)[:, :, None, None, None].expand_as(x)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-6, atol=1e-35)


@FORMATS
def test_same_bits_again(layout: str, device: str) -> None:
    x = in_layout(layout, 2, 24, 3, 5, 7, device=device).requires_grad_()
    given_ones = parameters(x, "frame")
    with two_passes():
        runs = []
        for _ in range(2):
            y = group_norm_silu(x, 4, impl="triton", **given_ones)
            runs.append([y, *torch.autograd.grad(y, [x, *given_ones.values()], torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@FORMATS
def test_every_candidate_configuration(layout: str, device: str) -> None:
    x = in_layout(layout, 1, 24, 2, 5, 7, device=device)
    with two_passes(), launch.recorded() as launches:
        group_norm_silu(x.detach().requires_grad_(), 4, impl="triton").sum().backward()
    assert {used.kernel for used in launches} == {f"group_norm_silu_{k}" for k in ("stats", "fwd", "bwd_sums", "bwd")}
    for used in launches:
        assert used.used in used.candidates
        for candidate in used.candidates if device == "cuda" else used.candidates[-1:]:
            with two_passes(), launch.trying(used.kernel, used.shape_class, candidate):
                check(x.detach(), 4, "triton")


@pytest.mark.parametrize(("work", "blocks"), [(1, 40960), (5, 900), (8, 450), (10, 450), (250, 144)])
def test_long_work_is_dealt_evenly(work: int, blocks: int) -> None:
    """The last of the programs that run 264 at a time ends within a tenth of a perfect deal."""
    dealt = group_norm_silu_terms.parts(work, blocks, 264)
    assert math.ceil(work * dealt / 264) * math.ceil(blocks / dealt) <= 1.1 * work * blocks / 264


def test_short_work_is_not_cut_beyond_its_blocks() -> None:
    assert group_norm_silu_terms.parts(1, 3, 264) == 3
    assert group_norm_silu_terms.parts(1000, 2, 264) == 1


def sizes(channels: int, groups: int, positions: int, channels_last: bool = True) -> group_norm_silu_terms.Sizes:
    return group_norm_silu_terms.Sizes(2, channels, positions, 1, groups, channels_last, 8)


def test_groups_share_a_program_until_rows_are_long() -> None:
    x = torch.empty(0, dtype=torch.bfloat16)
    shared = group_norm_silu_whole.whole(x, sizes(320, 32, 144), group_norm_silu_whole.FORWARD_MOST)
    assert shared is not None
    assert (shared.groups, shared.block_s, shared.block_c, shared.sizes.unit) == (4, 256, 64, 8)


@pytest.mark.parametrize(("channels", "groups", "positions"), [(320, 32, 1024), (512, 512, 4096), (128, 32, 65536)])
def test_larger_groups_and_short_rows_take_two_passes(channels: int, groups: int, positions: int) -> None:
    large = sizes(channels, groups, positions)
    x = torch.empty(0, dtype=torch.bfloat16)
    assert group_norm_silu_whole.whole(x, large, group_norm_silu_whole.FORWARD_MOST) is None


@pytest.mark.parametrize("width", [1, 2, 3, 4, 10, 32, 40, 64, 100, 256])
@pytest.mark.parametrize("column", [1, 2, 32, 64, 128])
def test_slots_and_shares_bound_what_meets(column: int, width: int) -> None:
    groups = 12
    channels = groups * width
    met: dict[int, set[int]] = {}
    shared: dict[int, set[int]] = {}
    for c in range(channels):
        met.setdefault(c // column, set()).add(c // width)
        shared.setdefault(c // width, set()).add(c // column)
    assert group_moments.slots_of(column, width, groups) >= max(map(len, met.values()))
    assert group_moments.shares_of(column, width) >= max(map(len, shared.values()))
