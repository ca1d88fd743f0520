"""conv3d by minimal filtering: every sum, layout, edge and instruction set against F.conv3d in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fastvdiff import dispatch, native
from fastvdiff.native import conv3d_cpu_winograd
from fastvdiff.ops import conv3d, conv3d_facts, norm_silu_conv3d
from fastvdiff.reference.conv3d import moments
from tests.closeness import GRADIENT_RATIO, GRADIENT_SCALE, assert_close
from tests.closeness import hold as hold_closely

from .test_conv3d import CHANNELS_LAST, FORMATS, eager, laid_out, run, tensors_of

KERNELS = ((1, 3, 3), (2, 3, 3), (3, 3, 3), (3, 1, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case(
    channels: int, outputs: int, sizes: tuple[int, ...], kernel: tuple[int, ...], **options: Any
) -> dict[str, Any]:
    """A convolution with every sum, in the form of test_conv3d's drawn calls."""
    plain = {
        "batch": 2, "sides": tuple(n for k in kernel for n in (k // 2, k // 2)), "stride": (1, 1, 1),
        "dilation": (1, 1, 1), "groups": 1, "modes": ("zeros",) * 3, "dtype": torch.float32, "layout": "channels_last",
        "weight_layout": "contiguous", "bias": True, "prefix": False, "channel_bias": 3, "residual": True, "seed": 1,
    }  # fmt: skip
    return plain | {"channels": channels, "outputs": outputs, "sizes": sizes, "kernel": kernel} | options


def hold(call: dict[str, Any], gradients: bool = True) -> None:
    """impl="cpu_winograd" is as close to float64 as torch in the call's dtype."""
    tensors, dtype = tensors_of(call), call["dtype"]
    steps = {"sides": call["sides"], "modes": call["modes"]}
    exact, exact_grads = run(eager, tensors, torch.float64, **steps)
    plain, plain_grads = run(eager, tensors, dtype, **steps)
    ours = {"padding": call["sides"], "padding_mode": call["modes"], "impl": "cpu_winograd"}
    if not gradients:
        with torch.no_grad():
            y = conv3d(**{name: t.to(dtype) for name, t in tensors.items()}, **ours)
        assert_close(y, exact, plain)
        return
    y, grads = run(conv3d, tensors, dtype, **ours)
    assert_close(y, exact, plain)
    largest = max(float(g.norm()) for g in exact_grads.values())
    for name, grad in grads.items():
        assert_close(grad, exact_grads[name], plain_grads[name], ratio=GRADIENT_RATIO,
                     least_scale=GRADIENT_SCALE * largest, what=f"gradient of {name}")  # fmt: skip
    assert grads["x"].stride() == torch.empty_like(tensors["x"]).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_layout(kernel: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    hold(case(24, 40, (3, 9, 6), kernel, layout=layout, dtype=dtype))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("channels", [(3, 5), (17, 33), (64, 16)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)], ids=str)
def test_every_instruction_set(kernel: tuple[int, ...], channels: tuple[int, int], isa: str) -> None:
    if isa not in native.available_isas():
        pytest.skip(f"this CPU or build has no {isa}")
    with native.use_isa(isa):
        hold(case(*channels, (5, 6, 5), kernel))
        hold(case(*channels, (5, 6, 5), kernel, layout="contiguous", channel_bias=2))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize(
    "sides", [(0,) * 6, (2, 0, 1, 1, 1, 1), (0, 3, 2, 0, 3, 3)], ids=["none", "causal", "past the kernel"]
)
def test_padding(kernel: tuple[int, ...], sides: tuple[int, ...]) -> None:
    hold(case(16, 16, (4, 5, 7), kernel, sides=sides))


@pytest.mark.parametrize("modes", [("replicate",) * 3, ("replicate", "zeros", "zeros")], ids=["all", "in time"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_repeated_edges(kernel: tuple[int, ...], modes: tuple[str, ...]) -> None:
    hold(case(16, 16, (4, 5, 3), kernel, modes=modes, sides=(2, 1, 1, 2, 3, 1)), gradients=False)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 3), (25, 4, 4)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_few_and_many_frames(kernel: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    hold(case(16, 24, sizes, kernel, batch=1))


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1)], ids=str)
def test_many_tiles_and_many_channels(kernel: tuple[int, ...]) -> None:
    """More tiles than a chunk of the weight's gradient has; more channels than are multiplied by tiles."""
    hold(case(16, 16, (16, 28, 28), kernel, batch=1))
    wide = 384 if kernel[0] == 1 else 896
    hold(case(wide, wide, (5, 9, 9), kernel, batch=1))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Calls that it takes, of any size."""
    kernel = draw(st.sampled_from(KERNELS))
    sides = tuple(draw(st.integers(0, 3)) for _ in range(6))
    least = [max(1, k - sides[2 * i] - sides[2 * i + 1]) for i, k in enumerate(kernel)]
    return case(
        draw(st.integers(1, 40)), draw(st.integers(1, 40)), tuple(n + draw(st.integers(0, 7)) for n in least), kernel,
        sides=sides, batch=draw(st.integers(0, 3)), dtype=draw(st.sampled_from([*DTYPES, torch.float32])),
        layout=draw(st.sampled_from(FORMATS)), weight_layout=draw(st.sampled_from(FORMATS[:2])),
        bias=draw(st.booleans()), channel_bias=draw(st.sampled_from([None, 2, 3])), residual=draw(st.booleans()),
        seed=draw(st.integers(1, 5)),
    )  # fmt: skip


@settings(max_examples=300)
@given(call=calls())
def test_drawn_calls(call: dict[str, Any]) -> None:
    if call["batch"]:
        hold(call)
        return
    y, grads = run(conv3d, tensors_of(call), call["dtype"], padding=call["sides"], impl="cpu_winograd")
    assert y.shape[0] == 0
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("channels", [16, 400], ids=["by tiles", "by panels"])
def test_same_bits_for_any_thread_count(kernel: tuple[int, ...], channels: int) -> None:
    call = case(channels, channels, (5, 7, 9), kernel)
    tensors = tensors_of(call)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, grads = run(conv3d, tensors, torch.float32, padding=call["sides"], impl="cpu_winograd")
            runs.append([y, grads["x"], grads["weight"]])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1)], ids=str)
def test_opcheck(kernel: tuple[int, ...]) -> None:
    tensors = {name: t.requires_grad_() for name, t in tensors_of(case(16, 16, (3, 4, 5), kernel)).items()}
    geometry = ([1, 1, 1], [k // 2 for k in kernel for _ in "01"], [1, 1, 1], [False] * 3, None)
    leaves = [tensors[name] for name in ("x", "weight", "bias", "channel_bias", "residual")]
    opcheck(torch.ops.fastvdiff.conv3d, (*leaves[:3], *geometry, *leaves[3:], 0, "cpu_winograd"))


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1)], ids=str)
def test_compiled_whole(kernel: tuple[int, ...]) -> None:
    tensors = {name: t.requires_grad_() for name, t in tensors_of(case(48, 48, (4, 16, 16), kernel)).items()}

    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return conv3d(x, weight, padding="same")

    assert dispatch.trace(call, tensors["x"], tensors["weight"])[0].chosen == "cpu_winograd"
    ours = [call(tensors["x"], tensors["weight"])]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours.append(compiled(tensors["x"], tensors["weight"]))
    grads = [torch.autograd.grad(y.square().sum(), (tensors["x"], tensors["weight"])) for y in ours]
    assert torch.equal(*ours)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_call_that_comes_again() -> None:
    """It goes straight to the kernel and gives the same bits; whatever differs is checked and chosen anew."""
    calls = case(32, 48, (4, 8, 8), (1, 3, 3), channel_bias=2)
    named = {**tensors_of(calls), "padding": "same"}
    with torch.no_grad():
        first = conv3d(**named)
        assert torch.equal(conv3d(**named), first)
        other = {**named, "x": named["x"] + 1, "residual": named["residual"] * 2, "bias": named["bias"] - 1}
        assert torch.equal(conv3d(**other), conv3d(**other, impl="cpu_winograd"))
        assert dispatch.trace(conv3d, **named)[0].chosen == "cpu_winograd"
        with dispatch.use_impl("reference"):
            torch.testing.assert_close(conv3d(**named), first, rtol=1e-4, atol=1e-4)
        for isa in native.available_isas():
            with native.use_isa(isa):
                torch.testing.assert_close(conv3d(**named), first, rtol=1e-4, atol=1e-4)
        wrong = {"stride": 1.0, "bias": named["bias"][:-1], "padding": [1, 1]}
        for name, value in wrong.items():
            with pytest.raises((ValueError, TypeError), match=f"conv3d: {name}: expected"):
                conv3d(**{**named, name: value})
    x = named["x"].detach().requires_grad_()
    y = conv3d(**{**named, "x": x})
    assert torch.equal(y, first)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_autocast() -> None:
    x, weight = laid_out(torch.randn(1, 16, 4, 8, 8), "channels_last").requires_grad_(), torch.randn(16, 16, 1, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv3d(x, weight.requires_grad_(), padding="same", impl="cpu_winograd")
    assert y.dtype == torch.bfloat16
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.dtype == dweight.dtype == torch.float32


def test_statistics_are_those_of_the_result() -> None:
    tensors = tensors_of(case(16, 16, (3, 8, 8), (1, 3, 3)))
    y, stats = conv3d(**tensors, padding="same", stats_groups=4, impl="cpu_winograd")
    assert torch.equal(stats, moments(y, 4))


def test_what_is_not_finite_is_carried() -> None:
    """To the whole tile: what is outside the tiles that see it stays as it is."""
    x, weight = torch.randn(1, 16, 1, 16, 16), torch.randn(16, 16, 1, 3, 3)
    before = conv3d(x, weight, padding="same", impl="cpu_winograd")
    x[0, 0, 0, 1, 1] = float("inf")
    y = conv3d(x, weight, padding="same", impl="cpu_winograd")
    assert not torch.isfinite(y[..., :3, :3]).any()
    assert torch.equal(y[..., 4:, 4:], before[..., 4:, 4:])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stride": (1, 2, 2)}, "stride and dilation of 1"),
        ({"dilation": 2}, "stride and dilation of 1"),
        ({"groups": 2}, "no grouped convolution"),
        ({"prefix": torch.zeros(1, 16, 1, 8, 8), "padding": (1, 0, 0, 0, 0, 0)}, "no prefix"),
        ({"padding_mode": "replicate"}, "no gradient with padding_mode 'replicate'"),
        ({"weight": torch.zeros(16, 16, 1, 5, 5)}, r"kernels of \(k, 3, 3\) and \(3, 1, 1\), got \(1, 5, 5\)"),
        ({"x": torch.zeros(1, 16, 3, 8, 8, dtype=torch.float64)}, "no float64 kernel"),
    ],
    ids=["stride", "dilation", "groups", "prefix", "replicate", "kernel", "float64"],
)
def test_what_it_does_not_run(options: dict[str, Any], reason: str) -> None:
    weight = torch.zeros(16, 16 // options.get("groups", 1), 1, 3, 3)
    call = {"x": torch.zeros(1, 16, 3, 8, 8, requires_grad=True), "weight": weight, "padding": 1} | options
    with pytest.raises(NotImplementedError, match=reason):
        conv3d(**call, impl="cpu_winograd")
    conv3d(**call)  # by itself the reference does


@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "reason"),
    [
        ((1, 12, 4, 16, 16), 64, (1, 3, 3), "slower here: fewer than 16 channels"),
        ((1, 64, 8, 6, 6), 64, (1, 3, 3), "slower here: of its tiles' 64 outputs 36 are asked for"),
        ((1, 64, 1, 8, 8), 64, (3, 3, 3), "slower here: the weight is large beside a tensor of fewer than 8 tiles"),
        ((1, 32, 16, 8, 8), 64, (3, 1, 1), "slower here: 3x1x1 with fewer than 48 channels, or on a small tensor"),
        ((1, 64, 8, 4, 4), 64, (1, 3, 3), None),
        ((1, 64, 16, 8, 8), 64, (3, 1, 1), None),
    ],
    ids=["channels", "tiles", "weight", "frames", "fast", "fast-frames"],
)
def test_stands_aside_where_it_is_slower(
    shape: tuple[int, ...], outputs: int, kernel: tuple[int, ...], reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(conv3d_facts, "_AVX512", False)
    (kernel_impl,) = (impl for impl in dispatch.ops()["conv3d"] if impl.name == "cpu_winograd")
    x, weight = torch.zeros(shape), torch.zeros(outputs, shape[1], *kernel)
    walk = dispatch.trace(conv3d, x, weight, padding="same", impl="reference")[0]
    assert kernel_impl.slower(walk.facts) == reason


def test_a_norm_in_front_has_its_gradient_directly() -> None:
    """The forward and the weight's gradient are filtered; what the norm gets, whose bias sums what cancels, is not."""
    x = laid_out(torch.randn(1, 32, 4, 8, 8), "channels_last").requires_grad_()
    weight = (torch.randn(32, 32, 1, 3, 3) / 17).requires_grad_()
    norm_weight, norm_bias = torch.randn(32, requires_grad=True), torch.randn(32, requires_grad=True)
    with torch.no_grad():
        inference = norm_silu_conv3d(x, 4, norm_weight, norm_bias, weight, padding="same")
    filtered = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("weight_gradient", "input_gradient"):
            run = getattr(conv3d_cpu_winograd, name)
            noted = lambda *args, name=name, run=run: (filtered.append(name), run(*args))[1]  # noqa: E731
            patch.setattr(conv3d_cpu_winograd, name, noted)
        y = norm_silu_conv3d(x, 4, norm_weight, norm_bias, weight, padding="same")
        y.square().sum().backward()
    assert filtered == ["weight_gradient"]
    assert torch.equal(inference, y)
    assert y.is_contiguous(memory_format=CHANNELS_LAST)
    hold_closely(norm_silu_conv3d, x, 4, norm_weight, norm_bias, weight, padding="same", dtype=torch.float32)


def ordinary() -> tuple[torch.Tensor, torch.Tensor]:
    """x and weight of a call that runs by itself."""
    x = laid_out(torch.randn(2, 48, 4, 8, 8), "channels_last").requires_grad_()
    return x, (torch.randn(48, 48, 1, 3, 3) / 20).requires_grad_()


def test_a_second_derivative_is_the_reference_s() -> None:
    x, weight = ordinary()

    def penalty(**options: Any) -> tuple[torch.Tensor, ...]:
        y = conv3d(x, weight, padding="same", **options).sin().sum()
        dx, dweight = torch.autograd.grad(y, (x, weight), create_graph=True)
        return torch.autograd.grad(dx.square().sum() + dweight.square().sum(), (x, weight))

    assert dispatch.trace(conv3d, x, weight, padding="same")[0].chosen == "cpu_winograd"
    for found, expected in zip(penalty(), penalty(impl="reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_transforms_are_left_to_torch() -> None:
    x, weight = (t.detach() for t in ordinary())
    plain = conv3d(x, weight, padding="same", impl="reference")
    batched = torch.vmap(lambda clip: conv3d(clip[None], weight, padding="same")[0])(x)
    torch.testing.assert_close(batched, plain, rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(lambda x: conv3d(x, weight, padding="same"), (x,), (x,))
    torch.testing.assert_close(tangent, plain, rtol=1e-4, atol=1e-4)


def test_another_default_device() -> None:
    x, weight = (t.detach() for t in ordinary())
    expected = conv3d(x, weight, padding="same", impl="reference")
    with torch.device("meta"):
        y = conv3d(x, weight, padding="same")
        (dweight,) = torch.autograd.grad(conv3d(x, weight.requires_grad_(), padding="same").sum(), weight)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert dweight.device.type == "cpu"


def test_a_frozen_weight_has_no_gradient_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = ordinary()
    monkeypatch.setattr(conv3d_cpu_winograd, "weight_gradient", lambda *args: pytest.fail("of a frozen weight"))
    for y in (
        conv3d(x, weight.detach(), padding="same"),
        norm_silu_conv3d(x, 4, None, None, weight.detach(), padding="same"),
    ):
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_asked_for_by_name_it_binds_no_other_op() -> None:
    x, weight = torch.randn(1, 16, 2, 4, 4), torch.randn(16, 16, 1, 1, 1)
    with dispatch.use_impl("cpu_winograd"):
        norm_silu_conv3d(x, 4, None, None, weight)
        with pytest.raises(NotImplementedError, match="got \\(1, 1, 1\\)"):
            conv3d(x, weight)


@pytest.mark.parametrize(
    ("avx512", "channels", "layout", "reason"),
    [
        (False, 16, "channels_last", None),
        (True, 16, "channels_last", "slower here: fewer than 24 channels"),
        (True, 24, "channels_last", None),
        (True, 16, "contiguous", None),
    ],
)
def test_wider_registers_make_direct_sums_faster(
    avx512: bool, channels: int, layout: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv3d_facts, "_AVX512", avx512)
    x, weight = laid_out(torch.zeros(1, channels, 8, 8, 8), layout), torch.zeros(channels, channels, 1, 3, 3)
    walk = dispatch.trace(conv3d, x, weight, padding="same", impl="reference")[0]
    assert conv3d_facts.slower_than_direct(walk.facts) == reason
