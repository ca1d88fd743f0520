"""group_norm_silu on clusters, on a CPU through the SIMT shim: against float64, in two orders, for races."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastvdiff.native.group_norm_silu_cuda_sm90 import GROUP_BYTES, RANKS, SHARED_MEMORY, cut
from fastvdiff.native.rows import is_channels_last
from fastvdiff.ops import group_norm_silu
from tests.ops.drawn_group_norm_silu import DTYPES, calls, check, in_layout, parameters
from tests.simt.group_norm_silu_library import Library

IMPL = "cuda_sm90"


@settings(max_examples=300)
@given(calls(batch=2, extent=6), st.booleans(), st.sampled_from([1, 7, 64]))
def test_drawn_cases(
    on_shim: Library, call: tuple[torch.Tensor, int, dict[str, Any]], descending: bool, multiprocessors: int
) -> None:
    x, groups, arguments = call
    arguments = {name: value for name, value in arguments.items() if name != "stats"}
    assume(x.numel() and x.stride(1) == 1 and is_channels_last(torch.empty_like(x)))
    assume(cut(*x.shape[:2], x[0, 0].numel(), groups, x.element_size(), 1) is not None)
    on_shim.descending, on_shim.multiprocessors = descending, multiprocessors
    check(x, groups, IMPL, **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups", "ranks"),
    [
        ((1, 64, 4, 9, 8), 8, 8),  # a block's rows are no multiple of what its threads span
        ((2, 40, 3, 5, 7), 4, 8),  # groups that end within a thread's channels
        ((1, 320, 2, 4, 4), 8, 8),
        ((2, 32, 1, 3, 3), 32, 8),  # one channel a group; blocks without rows
        ((3, 24, 3, 1, 1), 3, 2),
        ((2, 16, 9), 2, 8),
    ],
    ids=str,
)
def test_against_reference(
    on_shim: Library, shape: tuple[int, ...], groups: int, ranks: int, dtype: torch.dtype
) -> None:
    # As many blocks as there are places: the cut takes the largest cluster that positions allow.
    on_shim.multiprocessors = 1000
    x = in_layout("channels_last", *shape, dtype=dtype)
    check(x, groups, IMPL, **parameters(x, "frame" if len(shape) == 5 else "sample"))
    assert {cut_ranks for _, cut_ranks in on_shim.cuts} == {ranks}


@pytest.mark.parametrize("form", ["plain", "sample", "frame", "mixed", "mixed_other", "scale_alone", "shift_alone"])
def test_modulation_forms(on_shim: Library, form: str) -> None:
    on_shim.multiprocessors = 64
    x = in_layout("channels_last", 2, 32, 5, 2, 4, dtype=torch.bfloat16)
    check(x, 4, IMPL, silu=form != "mixed", **parameters(x, form))


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_large_mean(on_shim: Library, mean: float) -> None:
    on_shim.multiprocessors = 64
    check(in_layout("channels_last", 2, 16, 4, 20, 20) + mean, 4, IMPL)


def test_outlier_first(on_shim: Library) -> None:
    x = in_layout("channels_last", 1, 16, 4, 20, 20)
    x[:, :, 0, 0, 0] = 1e4
    check(x, 4, IMPL)


def test_values_that_are_not_finite(on_shim: Library) -> None:
    """As torch: an infinity or NaN poisons its group, no other."""
    x = in_layout("channels_last", 1, 16, 2, 4, 4)
    x[0, 0, 0, 0, 0], x[0, 4, 0, 0, 0] = torch.inf, torch.nan
    y, plain = (group_norm_silu(x, 4, impl=impl) for impl in (IMPL, "reference"))
    assert torch.equal(torch.isnan(y), torch.isnan(plain))
    torch.testing.assert_close(y[:, 8:], plain[:, 8:])


def test_same_bits_in_any_order(on_shim: Library) -> None:
    on_shim.multiprocessors = 64
    x = in_layout("channels_last", 2, 40, 3, 12, 12, dtype=torch.bfloat16)
    runs, given_ones = [], parameters(x, "frame")
    for on_shim.descending in (False, True):
        runs.append(group_norm_silu(x, 5, impl=IMPL, **given_ones))
    assert torch.equal(*runs)


def test_rows_of_a_wider_tensor_and_an_address_off_16_bytes(on_shim: Library) -> None:
    """Whole accesses stay on the clusters; others take the kernels of passes."""
    wide = torch.randn(2, 3, 4, 4, 48).bfloat16()
    for start, clusters in ((8, True), (4, False)):
        on_shim.cuts.clear()
        x = wide[..., start : start + 32].permute(0, 4, 1, 2, 3)
        check(x, 4, IMPL, **parameters(x, "sample"))
        assert bool(on_shim.cuts) == clusters


@pytest.mark.parametrize("build", ["races", "sanitized"])
@pytest.mark.parametrize(
    ("shape", "groups", "form", "dtype"),
    [
        ((1, 24, 2, 8, 8), 3, "mixed", torch.bfloat16),
        ((2, 40, 3, 5, 7), 4, "frame", torch.float16),  # groups that end within a thread's channels
        ((2, 32, 1, 3, 3), 32, "sample", torch.float32),  # blocks without rows
    ],
    ids=str,
)
def test_races_and_overruns(
    on_shim: Library, shape: tuple[int, ...], groups: int, form: str, dtype: torch.dtype, build: str
) -> None:
    on_shim.build, on_shim.multiprocessors = build, 64
    for on_shim.descending in (False, True)[: 1 + (build == "races")]:  # what is accessed does not depend on the order
        x = in_layout("channels_last", *shape, dtype=dtype)
        check(x, groups, IMPL, **parameters(x, form))
    assert on_shim.cuts


def test_the_cut_of_published_shapes() -> None:
    """The sizes that ops.md names: which fit, in how many blocks, in lines of what width."""
    cuts = {
        name: cut(batch, channels, positions, 32, 2, 132)
        for name, (batch, channels, positions) in {
            "1x512x8x45x80": (1, 512, 8 * 45 * 80),
            "svd-l2": (2, 1280, 25 * 18 * 32),
            "svd-l3": (2, 1280, 25 * 9 * 16),
            "svd-l0": (2, 320, 25 * 72 * 128),
            "vae": (1, 128, 20 * 256 * 256),
        }.items()
    }
    assert cuts["1x512x8x45x80"] == (2, 8)  # 128 blocks on 132 multiprocessors, 64-byte lines
    assert cuts["svd-l2"] == (1, 8)
    assert cuts["svd-l3"] is not None
    assert cuts["svd-l0"] is None
    assert cuts["vae"] is None


@settings(max_examples=200)
@given(st.integers(1, 4), st.integers(1, 64), st.sampled_from([1, 4, 8, 20, 40]), st.integers(1, 40000),
       st.sampled_from([2, 4]), st.integers(1, 200))  # fmt: skip
def test_a_cut_fits(batch: int, groups: int, width: int, positions: int, itemsize: int, multiprocessors: int) -> None:
    chosen = cut(batch, groups * width, positions, groups, itemsize, multiprocessors)
    if chosen is None:
        return
    together, ranks = chosen
    column = together * width * itemsize
    assert groups % together == 0
    assert column % 16 == 0
    assert ranks in RANKS
    assert ranks <= positions
    assert -(-positions // ranks) * column + together * (GROUP_BYTES + width * 12) <= SHARED_MEMORY


def test_what_is_refused(on_shim: Library) -> None:
    for x, groups, reason in (
        (torch.randn(1, 16, 2, 4, 4), 4, "not channels_last"),
        (in_layout("channels_last", 1, 4, 2, 4, 4, dtype=torch.bfloat16), 2, "no column of whole groups"),
        (torch.empty(1, 512, 60000, 1, 1).contiguous(memory_format=torch.channels_last_3d), 8, "no column"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            group_norm_silu(x, groups, impl=IMPL)
