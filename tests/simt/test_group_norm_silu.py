"""group_norm_silu's CUDA kernels on a CPU, through their native module and the SIMT shim, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvdiff.ops import group_norm_silu
from tests.ops.drawn_group_norm_silu import ARGUMENTS, DTYPES, LAYOUTS, calls, check, in_layout, parameters
from tests.simt.group_norm_silu_library import Library

FORMATS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@settings(max_examples=300)
@given(calls(batch=2, extent=6), st.booleans(), st.integers(1, 3))
def test_drawn_cases(
    on_shim: Library, call: tuple[torch.Tensor, int, dict[str, Any]], descending: bool, multiprocessors: int
) -> None:
    x, groups, arguments = call
    on_shim.descending, on_shim.multiprocessors = descending, multiprocessors
    check(x, groups, "cuda", **arguments)


@pytest.mark.long
@settings(max_examples=2000)
@given(calls(), st.booleans(), st.integers(1, 8))
def test_many_drawn_cases(
    on_shim: Library, call: tuple[torch.Tensor, int, dict[str, Any]], descending: bool, multiprocessors: int
) -> None:
    x, groups, arguments = call
    on_shim.descending, on_shim.multiprocessors = descending, multiprocessors
    check(x, groups, "cuda", **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 40, 3, 5, 7), 8), ((2, 96, 1, 4, 4), 32), ((3, 32, 4, 8), 32), ((2, 12, 33), 4), ((1, 1, 3, 4, 5), 1)],
    ids=str,
)
def test_against_reference(
    on_shim: Library, shape: tuple[int, ...], groups: int, layout: str, dtype: torch.dtype
) -> None:
    x = in_layout(layout, *shape, dtype=dtype)
    check(x, groups, "cuda", **parameters(x, "frame" if len(shape) == 5 else "sample"))


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    # Columns that end within a group, groups that end within a thread's channels, a group over several columns.
    [((1, 2240, 1, 2, 3), 32), ((1, 2240, 1, 2, 2), 1), ((1, 24, 4, 20, 24), 8), ((2, 16, 1, 40, 40), 1)],
    ids=str,
)
def test_many_blocks(on_shim: Library, shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: str) -> None:
    on_shim.multiprocessors = 5
    x = in_layout(layout, *shape, dtype=dtype)
    check(x, groups, "cuda", **parameters(x, "mixed"))


@FORMATS
@pytest.mark.parametrize("form", ["plain", "sample", "frame", "mixed", "mixed_other", "scale_alone", "shift_alone"])
def test_modulation_forms(on_shim: Library, form: str, layout: str) -> None:
    x = in_layout(layout, 2, 24, 5, 2, 4, dtype=torch.bfloat16)
    check(x, 4, "cuda", silu=form != "mixed", **parameters(x, form))


@FORMATS
@pytest.mark.parametrize("parameter_dtype", [*DTYPES, torch.float64], ids=str)
def test_parameters_as_they_are(on_shim: Library, parameter_dtype: torch.dtype, layout: str) -> None:
    x = in_layout(layout, 2, 16, 3, 4, 4)
    given_ones = parameters(x, "sample", parameter_dtype)
    embedding = torch.randn(2, 32).to(parameter_dtype)
    scale, shift = (t.requires_grad_() for t in embedding.chunk(2, dim=1))
    check(x, 4, "cuda", **given_ones | {"scale": scale, "shift": shift})


@FORMATS
@pytest.mark.parametrize("missing", ARGUMENTS)
def test_one_parameter_missing(on_shim: Library, missing: str, layout: str) -> None:
    x = in_layout(layout, 2, 16, 3, 4, 4)
    check(x, 4, "cuda", **{name: p for name, p in parameters(x, "frame").items() if name != missing})


def statistics(x: torch.Tensor, groups: int) -> torch.Tensor:
    grouped = x.double().reshape(len(x), groups, -1)
    mean = grouped.mean(-1)
    return torch.stack([mean, (grouped - mean[..., None]).square().sum(-1)], -1).float()


@FORMATS
def test_statistics_given(on_shim: Library, layout: str) -> None:
    x = in_layout(layout, 2, 24, 3, 4, 4)
    check(x, 4, "cuda", stats=statistics(x, 4), **parameters(x, "sample"))


@FORMATS
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_large_mean(on_shim: Library, mean: float, layout: str) -> None:
    check(in_layout(layout, 2, 16, 4, 20, 20) + mean, 4, "cuda")


@FORMATS
def test_outlier_first(on_shim: Library, layout: str) -> None:
    x = in_layout(layout, 1, 16, 4, 20, 20)
    x[:, :, 0, 0, 0] = 1e4
    check(x, 4, "cuda")


@FORMATS
def test_values_that_are_not_finite(on_shim: Library, layout: str) -> None:
    """As torch: an infinity or NaN poisons its group, no other."""
    x = in_layout(layout, 1, 16, 2, 4, 4)
    x[0, 0, 0, 0, 0], x[0, 4, 0, 0, 0] = torch.inf, torch.nan
    y, plain = (group_norm_silu(x, 4, impl=impl) for impl in ("cuda", "reference"))
    assert torch.equal(torch.isnan(y), torch.isnan(plain))
    torch.testing.assert_close(y[:, 8:], plain[:, 8:])


@pytest.mark.parametrize("shape", [(0, 8, 2, 3, 3), (2, 8, 0, 3, 3)], ids=str)
def test_empty(on_shim: Library, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).requires_grad_()
    leaves = {"x": x, **parameters(x, "sample")}
    y = group_norm_silu(num_groups=4, impl="cuda", **leaves)
    for grad in torch.autograd.grad(y.sum(), list(leaves.values())):
        assert not grad.any()


@FORMATS
def test_same_bits_in_any_order(on_shim: Library, layout: str) -> None:
    x = in_layout(layout, 2, 40, 3, 12, 12, dtype=torch.bfloat16).requires_grad_()
    given_ones = parameters(x, "frame")
    runs = []
    for on_shim.descending in (False, True):
        y = group_norm_silu(x, 8, impl="cuda", **given_ones)
        runs.append([y, *torch.autograd.grad(y, [x, *given_ones.values()], torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# (shape, groups, modulation, dtype), on 3 multiprocessors: every pass with whole accesses and with single elements.
WATCHED = {
    "frames": ((1, 24, 2, 8, 8), 4, "mixed", torch.bfloat16),
    "frames, float32": ((2, 24, 2, 4, 6), 4, "mixed_other", torch.float32),
    "elements": ((2, 6, 3, 3, 5), 3, "frame", torch.float16),
    "wide groups of one frame": ((2, 80, 1, 4, 6), 2, "sample", torch.float16),
    "many chunks": ((1, 8, 1, 40, 36), 2, "plain", torch.bfloat16),
    "many columns": ((1, 2240, 1, 2, 3), 32, "plain", torch.float32),
    "a group of many columns": ((1, 2240, 1, 2, 2), 1, "scale_alone", torch.bfloat16),
}


@pytest.mark.parametrize("build", ["races", "sanitized"])
@FORMATS
@pytest.mark.parametrize("name", WATCHED)
def test_races_and_overruns(on_shim: Library, name: str, layout: str, build: str) -> None:
    shape, groups, form, dtype = WATCHED[name]
    on_shim.build, on_shim.multiprocessors = build, 3
    for on_shim.descending in (False, True)[: 1 + (build == "races")]:  # what is accessed does not depend on the order
        x = in_layout(layout, *shape, dtype=dtype)
        check(x, groups, "cuda", **parameters(x, form))


@pytest.mark.parametrize("build", ["races", "sanitized"])
@FORMATS
def test_races_and_overruns_with_statistics(on_shim: Library, layout: str, build: str) -> None:
    on_shim.build = build
    x = in_layout(layout, 2, 24, 3, 4, 4)
    check(x, 4, "cuda", stats=statistics(x, 4), **parameters(x, "sample"))
