"""group_norm_silu: every implementation against the reference, in every layout, dtype and awkward size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from fastvdiff import dispatch, native, ops
from fastvdiff.ops import group_norm_silu
from tests.ops.drawn_group_norm_silu import (
    ARGUMENTS,
    DTYPES,
    FEW_CHANNELS,
    LAYOUTS,
    calls,
    check,
    in_layout,
    parameters,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 40, 7, 5, 9), 8),
        ((2, 320, 1, 3, 5), 32),
        ((2, 8, 25, 3, 3), 2),
        ((3, 32, 7, 11), 32),
        ((2, 40, 33), 4),
        ((1, 1, 3, 4, 5), 1),
        ((2, 12, 1, 1, 1), 3),
    ],
    ids=str,
)
def test_against_reference(shape: tuple[int, ...], groups: int, layout: str, dtype: torch.dtype) -> None:
    x = in_layout(layout, *shape, dtype=dtype)
    check(x, groups, **parameters(x, "frame" if len(shape) == 5 else "sample"))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [6, 40, 64])
def test_every_instruction_set(channels: int, layout: str, dtype: torch.dtype, isa: str) -> None:
    if isa not in native.available_isas():
        pytest.skip(f"this CPU or build has no {isa}")
    with native.use_isa(isa):
        x = in_layout(layout, 2, channels, 3, 7, 9, dtype=dtype)
        check(x, 2, **parameters(x, "mixed"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("silu", [True, False], ids=("silu", "no_silu"))
@pytest.mark.parametrize("form", ["plain", "sample", "frame", "mixed", "mixed_other", "scale_alone", "shift_alone"])
def test_modulation_forms(form: str, silu: bool, layout: str) -> None:
    x = in_layout(layout, 2, 24, 5, 6, 7)
    check(x, 4, silu=silu, **parameters(x, form))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_mixed_parameter_dtypes(parameter_dtype: torch.dtype, dtype: torch.dtype, layout: str) -> None:
    x = in_layout(layout, 2, 16, 3, 4, 5, dtype=dtype)
    check(x, 4, **parameters(x, "sample", parameter_dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("missing", ARGUMENTS)
def test_one_parameter_missing(missing: str, layout: str) -> None:
    x = in_layout(layout, 2, 16, 3, 4, 5)
    given_ones = {name: p for name, p in parameters(x, "frame").items() if name != missing}
    check(x, 4, **given_ones)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 64, 3, 40, 40), 32), ((2, 8, 2, 96, 100), 1), ((1, 1100, 2, 9, 9), 2)], ids=str
)
def test_many_blocks(shape: tuple[int, ...], groups: int, layout: str) -> None:
    x = in_layout(layout, *shape)
    check(x, groups, **parameters(x, "frame"))


@settings(max_examples=330)
@given(calls())
def test_drawn_cases(call: tuple[torch.Tensor, int, dict[str, Any]]) -> None:
    x, groups, arguments = call
    check(x, groups, **arguments)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", ["plain", "sample", "mixed"])
@pytest.mark.parametrize(("channels", "groups"), FEW_CHANNELS)
def test_few_channels(channels: int, groups: int, form: str, layout: str) -> None:
    for dtype in DTYPES:
        x = in_layout(layout, 2, channels, 3, 5, 7, dtype=dtype)
        check(x, groups, **parameters(x, form))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(0, 8, 2, 3, 3), (2, 8, 0, 3, 3)], ids=str)
def test_empty(shape: tuple[int, ...], layout: str) -> None:
    x = in_layout(layout, *shape).requires_grad_()
    leaves = {"x": x, **parameters(x, "sample")}
    y = group_norm_silu(num_groups=4, impl="cpu", **leaves)
    assert y.shape == x.shape
    for name, grad in zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True):
        assert grad.shape == leaves[name].shape
        assert not grad.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_large_mean(mean: float, layout: str) -> None:
    x = in_layout(layout, 2, 16, 4, 40, 40)
    y = check((x + mean), 4)
    normal = F.silu(F.group_norm((x + mean).double(), 4)).float()
    assert (y - normal).abs().max() < 1e-7 * mean + 1e-5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_outlier_first(layout: str) -> None:
    """A first value far from all others: sums around it alone would cancel."""
    x = in_layout(layout, 1, 16, 4, 40, 40)
    x[:, :, 0, 0, 0] = 1e4
    check(x, 4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_given(layout: str) -> None:
    x = in_layout(layout, 2, 24, 5, 6, 7)
    grouped = x.double().reshape(2, 4, -1)
    mean = grouped.mean(-1)
    stats = torch.stack([mean, (grouped - mean[..., None]).square().sum(-1)], -1).float()
    check(x, 4, stats=stats, **parameters(x, "sample"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 64, 8, 32, 32), (3, 40, 9, 21, 23), (5, 6, 2, 64, 63)], ids=str)
def test_same_bits_for_any_thread_count(shape: tuple[int, ...], layout: str) -> None:
    x = in_layout(layout, *shape).requires_grad_()
    given_ones = parameters(x, "frame")
    runs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        y = group_norm_silu(x, 2, impl="cpu", **given_ones)
        runs.append([y, *torch.autograd.grad(y, [x, *given_ones.values()], torch.ones_like(y))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_non_finite_stays_in_its_group(value: float, layout: str) -> None:
    x = in_layout(layout, 2, 16, 3, 5, 7)
    x[1, 5, 1, 2, 3] = value
    x.requires_grad_()
    y = group_norm_silu(x, 4, impl="cpu")
    y.sum().backward()
    bad = torch.zeros(2, 16, dtype=torch.bool)
    bad[1, 4:8] = True
    for result in (y, x.grad):
        assert torch.isfinite(result[~bad]).all()
        assert torch.isnan(result[bad]).all()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_activation_at_the_ends(layout: str, isa: str) -> None:
    if isa not in native.available_isas():
        pytest.skip(f"this CPU or build has no {isa}")
    ends = torch.tensor([[math.inf, -math.inf, math.nan, 1e30, -1e30, 88.5, -88.5, -200.0, 200.0, 0.0, -1e-30]])
    x = in_layout(layout, 1, ends.shape[1], 2, 3, 3)
    zero = torch.zeros(ends.shape[1])
    with native.use_isa(isa):
        y = group_norm_silu(x, 1, zero, zero, shift=ends, impl="cpu")
    expected = F.silu(ends)[:, :, None, None, None].expand_as(x)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str, impl: str) -> None:
    x = in_layout(layout, 2, 8, 3, 4, 5).requires_grad_()
    p = parameters(x, "frame")
    arguments = (x, 4, p["weight"], p["bias"], 1e-5, p["scale"], p["shift"], True, None, impl)
    torch.library.opcheck(torch.ops.fastvdiff.group_norm_silu.default, arguments)
    _, moments = torch.ops.fastvdiff.group_norm_silu(*arguments)
    grad = torch.randn(2, 8, 3, 4, 5)
    detached = [t.detach() for t in (x, moments, *p.values())]
    torch.library.opcheck(
        torch.ops.fastvdiff.group_norm_silu_backward.default, (grad, *detached[:2], 4, *detached[2:], True, impl)
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_without_a_graph_break(layout: str) -> None:
    x = in_layout(layout, 2, 8, 3, 4, 5).requires_grad_()
    p = parameters(x, "sample")

    def step(x: torch.Tensor) -> torch.Tensor:
        return group_norm_silu(x * 1.0, 4, p["weight"], p["bias"], scale=p["scale"], shift=p["shift"])

    eager, compiled = step(x), torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    assert compiled.stride() == eager.stride()
    leaves = [x, *p.values()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (eager, compiled)), strict=True):
        torch.testing.assert_close(a, b)


def test_recompiles_at_most_twice_over_five_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x: group_norm_silu(x, 4), backend=counter, fullgraph=True)
    for size in (4, 5, 6, 7, 8):
        compiled(torch.randn(2, 8, 3, size, size + 1))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_autocast(layout: str, impl: str) -> None:
    x = in_layout(layout, 2, 8, 3, 4, 5).requires_grad_()
    p = parameters(x, "sample")
    with torch.autocast("cpu", torch.bfloat16):
        y = group_norm_silu(x, 4, impl=impl, **p)
    assert y.dtype == torch.bfloat16
    exact = group_norm_silu(x.to(torch.bfloat16), 4, impl="reference", **p)
    torch.testing.assert_close(y, exact, rtol=1e-2, atol=1e-2)
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, *p.values()))


def test_float64_runs_the_reference() -> None:
    x = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64)
    (walk,) = dispatch.explain(ops.group_norm_silu, x, 4)
    assert walk.chosen == "reference"
    with pytest.raises(NotImplementedError, match="no float64 kernel"):
        group_norm_silu(x, 4, impl="cpu")


def test_forward_mode_names_the_way_out() -> None:
    x = torch.randn(2, 8, 3, 4, 5)
    with pytest.raises(NotImplementedError, match=r'no forward-mode derivative; pass impl="reference"'):
        torch.func.jvp(lambda t: group_norm_silu(t, 4, impl="cpu"), (x,), (torch.randn_like(x),))
    with torch.autograd.forward_ad.dual_level():
        group_norm_silu(x, 4, impl="cpu")  # nothing to lose: no tangent
        dual = torch.autograd.forward_ad.make_dual(x, torch.randn_like(x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            group_norm_silu(dual, 4, impl="cpu")
        y = group_norm_silu(dual, 4, impl="reference")
        assert torch.autograd.forward_ad.unpack_dual(y).tangent.any()


def test_second_derivative_names_the_way_out() -> None:
    x = torch.randn(2, 8, 3, 4, 5, requires_grad=True)
    (g,) = torch.autograd.grad(group_norm_silu(x, 4, impl="cpu").square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative; pass impl="reference"'):
        g.sum().backward()
    (g,) = torch.autograd.grad(group_norm_silu(x, 4, impl="reference").square().sum(), x, create_graph=True)
    g.sum().backward()


def test_a_pending_negation_is_seen() -> None:
    x = torch.randn(2, 8, 3, 5, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(group_norm_silu(x, 4, impl="cpu"), group_norm_silu(x.resolve_neg(), 4, impl="cpu"))


def test_modes_and_profilers_see_the_op() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    x = torch.randn(2, 8, 3, 5, requires_grad=True)
    with Seen():
        group_norm_silu(x, 4, impl="cpu").sum().backward()
    assert {"fastvdiff.group_norm_silu.default", "fastvdiff.group_norm_silu_backward.default"} <= set(names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        group_norm_silu(x, 4, impl="cpu")
    assert "fastvdiff::group_norm_silu" in {event.key for event in profile.key_averages()}


def test_vmap_names_the_way_out() -> None:
    x = torch.randn(3, 2, 8, 3, 4, 5)
    with pytest.raises(NotImplementedError, match=r'no vmap rule; pass impl="reference"'):
        torch.vmap(lambda t: group_norm_silu(t, 4, impl="cpu"))(x)
    torch.vmap(lambda t: group_norm_silu(t, 4, impl="reference"))(x)


X = torch.zeros(2, 8, 3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, 4), {}, TypeError, "x: expected a tensor, got 3 (int)"),
        ((X.to_sparse(), 4), {}, TypeError, "x: expected a dense (strided) tensor"),
        ((X.int(), 4), {}, TypeError, "x: expected dtype float32, bfloat16, float16 or float64, got torch.int32"),
        ((X[0, 0, 0], 4), {}, ValueError, "x: expected (B, C, *spatial) with one to three spatial dimensions"),
        ((X, 3), {}, ValueError, "num_groups: expected a divisor of C = 8, got 3"),
        ((X, 0), {}, ValueError, "num_groups: expected a divisor of C = 8, got 0"),
        ((X, 2.0), {}, TypeError, "num_groups: expected an int, got 2.0 (float)"),
        ((X[:, :, :1, :1, :1], 8), {}, ValueError, "x: expected more than one value per group"),
        ((X, 4, X[0, :7, 0, 0, 0]), {}, ValueError, "weight: expected shape (C,) = (8,), got (7,)"),
        ((X, 4, None, X), {}, ValueError, "bias: expected shape (C,) = (8,), got (2, 8, 3, 4, 5)"),
        ((X, 4), {"scale": X[0, :, 0, 0, 0]}, ValueError, "scale: expected shape (B, C) or (B, C, T)"),
        ((X[:, :, 0], 4), {"shift": X[..., 0, 0]}, ValueError, "shift: expected shape (B, C) = (2, 8)"),
        ((X, 4), {"scale": 1.0}, TypeError, "scale: expected a tensor, got 1.0 (float)"),
        ((X, 4), {"shift": X[..., 0, 0].long()}, TypeError, "shift: expected dtype float32"),
        ((X, 4), {"stats": X[:, :4, 0, 0]}, ValueError, "stats: expected shape (B, G, 2) = (2, 4, 2)"),
        ((X, 4, X[0, :, 0, 0, 0].to("meta")), {}, ValueError, "weight: expected a tensor on cpu as x, got meta"),
        (
            (X, 4),
            {"impl": "triton2"},
            ValueError,
            "impl: expected one of 'cpu', 'triton', 'cuda', 'cuda_sm90', 'reference', got 'triton2'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        group_norm_silu(*arguments, **options)
    assert f"group_norm_silu: {message}" in str(caught.value)
