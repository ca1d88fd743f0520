"""group_norm_silu's CUDA kernels on a CPU, through their native module and the SIMT shim, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvdiff.ops import group_norm_silu
from tests.ops.drawn_group_norm_silu import ARGUMENTS, DTYPES, LAYOUTS, calls, check, in_layout, parameters
from tests.simt.group_norm_silu_library import SOURCES, Gradient, Library, Parameter, Params
from tests.simt.host import call

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


@FORMATS
def test_statistics_given(on_shim: Library, layout: str) -> None:
    x = in_layout(layout, 2, 24, 3, 4, 4)
    grouped = x.double().reshape(2, 4, -1)
    mean = grouped.mean(-1)
    stats = torch.stack([mean, (grouped - mean[..., None]).square().sum(-1)], -1).float()
    check(x, 4, "cuda", stats=stats, **parameters(x, "sample"))


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


@pytest.mark.parametrize(
    "strides",
    [
        (2**31, 1, 256, 64, 16),
        (2**31, 32, 16, 4, 1),
        (16, 1, 2**30 + 2**28, 2**28 + 2**26, 2**26 + 2**24),
        (32, 2**27 + 2**24, 16, 4, 1),
    ],
    ids=("samples apart", "samples apart, contiguous", "positions apart", "channels apart"),
)
def test_offsets_past_2_31(on_shim: Library, strides: tuple[int, ...]) -> None:
    """Views whose last element lies past 2^31; of the memory between, nothing is ever touched."""
    shape = (2, 16, 2, 4, 4)
    far = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert far > 2**31
    x = torch.empty(far, dtype=torch.bfloat16).as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    check(x, 4, "cuda", **parameters(x, "frame"))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_races(on_shim: Library, dtype: torch.dtype, layout: str) -> None:
    on_shim.build = "races"
    for on_shim.descending in (False, True):
        x = in_layout(layout, 1, 24, 2, 8, 8, dtype=dtype)
        check(x, 4, "cuda", **parameters(x, "mixed"))


@pytest.mark.parametrize("channels_last", [False, True], ids=("contiguous", "channels_last"))
def test_no_access_past_an_end(channels_last: bool) -> None:
    """AddressSanitizer and UBSan see nothing, and the results are the ordinary build's."""
    batch, channels, frames, positions, groups = 2, 24, 2, 80, 4
    row = channels if channels_last else positions
    sizes = {"batch": batch, "channels": channels, "frames": frames, "positions": positions, "groups": groups}
    strides = {f"stride_{t}{of}": channels * positions if of == "b" else row for t in "xyg" for of in "br"}
    results = []
    for build in ("ordinary", "sanitized"):
        torch.manual_seed(0)
        draw = {name: torch.randn(batch, channels * positions).bfloat16() for name in ("x", "grad")}
        given_ones = {f"{name}.data": torch.randn(channels) for name in ("weight", "bias")}
        given_ones["scale.data"] = torch.randn(batch, channels, frames)
        written = {"y": torch.zeros_like(draw["x"]), "dx": torch.zeros_like(draw["x"])}
        grads = {"dweight.data": torch.zeros(channels), "dscale.data": torch.zeros(batch, channels, frames)}
        params = Params(
            eps=1e-5, silu=True, channels_last=channels_last, dtype=1, multiprocessors=3, **sizes, **strides,
            weight=Parameter(stride_c=1), bias=Parameter(stride_c=1), dscale=Gradient(per_frame=True),
            scale=Parameter(None, channels * frames, frames, 1),
        )  # fmt: skip
        workspace = torch.zeros(Library().workspace(params))
        shared = {"moments": torch.zeros(batch, groups, 2), "workspace": workspace, "x": draw["x"], **given_ones}
        call(SOURCES, "group_norm_silu_forward", params, {**shared, "y": written["y"]}, build=build)
        backward = {**shared, "grad": draw["grad"], "dx": written["dx"], **grads}
        call(SOURCES, "group_norm_silu_backward", params, backward, build=build)
        results.append([*written.values(), *grads.values()])
    assert results[0][1].any()
    for ordinary, sanitized in zip(*results, strict=True):
        torch.testing.assert_close(sanitized, ordinary, rtol=1e-6, atol=1e-6)
