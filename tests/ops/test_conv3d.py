"""conv3d against F.conv3d(F.pad(...)) written out here in float64, over drawn shapes, formats, paddings and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from fastvdiff import dispatch
from fastvdiff.ops import conv3d, group_norm_silu
from fastvdiff.reference import conv3d as reference
from tests.closeness import GRADIENT_RATIO, GRADIENT_SCALE, assert_close

CHANNELS_LAST = torch.channels_last_3d
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNELS = ((1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3), (1, 2, 3), (2, 1, 1), (2, 3, 1), (1, 4, 4))
FORMATS = ("contiguous", "channels_last", "sliced", "sliced_channels_last", "transposed")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x in a layout: whole, cut out of a wider tensor, or with dimensions swapped in memory."""
    if layout == "channels_last":
        return x.contiguous(memory_format=CHANNELS_LAST)
    if layout == "transposed":
        return x.transpose(1, 3).contiguous().transpose(1, 3)
    if layout.startswith("sliced"):
        wide = x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), float("nan"))
        if layout == "sliced_channels_last":
            wide = wide.contiguous(memory_format=CHANNELS_LAST)
        wide[:, 1:-2] = x
        return wide[:, 1:-2]
    return x.contiguous()


def eager(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, stride: Any = 1,
    sides: tuple[int, ...] = (0,) * 6, dilation: Any = 1, groups: int = 1, modes: tuple[str, ...] = ("zeros",) * 3,
    prefix: torch.Tensor | None = None, channel_bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The meaning, step by step: one dimension padded after the other, then torch's convolution, then the sums."""
    if prefix is not None:
        x, sides = torch.cat((prefix, x), 2), (0, *sides[1:])
    for i, mode in enumerate(modes):
        padding = [0] * 6
        padding[4 - 2 * i : 6 - 2 * i] = sides[2 * i : 2 * i + 2]
        x = F.pad(x, padding, mode="constant" if mode == "zeros" else mode)
    extent = reference.triple(dilation)[2] * (weight.shape[4] - 1) + 1
    if x.shape[4] - extent < reference.triple(stride)[2]:
        # One column of output: without a stride, which torch gets wrong in bfloat16 (pytorch issue 169688).
        x, stride = x[..., :extent], (*reference.triple(stride)[:2], 1)
    y = F.conv3d(x, weight, bias, stride, 0, dilation, groups)
    if channel_bias is not None:
        y = y + channel_bias.reshape(*channel_bias.shape, *(1,) * (5 - channel_bias.dim()))
    return y if residual is None else y + residual


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes, options and layouts of one call that is valid."""
    kernel = draw(st.sampled_from(KERNELS))
    stride = draw(st.sampled_from([(1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 2, 2), (1, 1, 3)]))
    dilation = draw(st.sampled_from([(1, 1, 1), (1, 1, 1), (2, 1, 1), (1, 2, 2)]))
    symmetric = draw(st.booleans())
    sides = [draw(st.integers(0, 2)) for _ in range(6)]
    sides = [sides[i - i % 2] if symmetric else sides[i] for i in range(6)]
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - sides[2 * i] - sides[2 * i + 1]) for i in range(3)]
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    channels, outputs = groups * draw(st.sampled_from([1, 2, 3, 8, 20])), groups * draw(st.sampled_from([1, 2, 5, 8]))
    mode = st.sampled_from(["zeros", "replicate"])
    modes = (draw(mode),) * 3 if draw(st.booleans()) else tuple(draw(mode) for _ in "thw")
    return {
        "batch": draw(st.sampled_from([0, 1, 1, 2, 3])), "channels": channels, "outputs": outputs, "groups": groups,
        "sizes": [n + draw(st.integers(0, 5)) for n in least], "kernel": kernel, "stride": stride,
        "dilation": dilation, "sides": tuple(sides), "modes": modes,
        "dtype": draw(st.sampled_from([*DTYPES, torch.float32, torch.bfloat16])),
        "layout": draw(st.sampled_from(FORMATS)), "weight_layout": draw(st.sampled_from(FORMATS[:2])),
        "bias": draw(st.booleans()), "prefix": draw(st.integers(0, 3)) == 0,
        "channel_bias": draw(st.sampled_from([None, 2, 3])), "residual": draw(st.booleans()),
        "stats_groups": draw(st.sampled_from([0, 0, groups])), "seed": draw(st.integers(1, 3)),
    }  # fmt: skip


def tensors_of(call: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The call's tensors, in its dtype and layouts."""
    generator = torch.Generator().manual_seed(call["seed"])

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(call["dtype"])

    batch, channels, outputs, kernel = call["batch"], call["channels"], call["outputs"], call["kernel"]
    sizes = reference.output_sizes(call["sizes"], kernel, call["stride"], call["sides"], call["dilation"])
    found = {
        "x": laid_out(draw(batch, channels, *call["sizes"]), call["layout"]),
        "weight": laid_out(draw(outputs, channels // call["groups"], *kernel), call["weight_layout"]),
    }
    if call["bias"]:
        found["bias"] = draw(outputs)
    if call["prefix"]:
        found["prefix"] = draw(batch, channels, call["sides"][0], *call["sizes"][1:])
    if call["channel_bias"]:
        found["channel_bias"] = draw(batch, outputs, *sizes[: call["channel_bias"] - 2])
    if call["residual"]:
        found["residual"] = laid_out(draw(batch, outputs, *sizes), call["layout"])
    return found


def run(op: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The result on fresh leaves in `dtype`, and the gradient of each under one cotangent."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    result = op(**leaves, **options)
    y = result[0] if isinstance(result, tuple) else result
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16).to(dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent)
    return result, dict(zip(leaves, grads, strict=True))


@settings(max_examples=320)
@given(call=calls())
def test_drawn_calls(call: dict[str, Any]) -> None:
    tensors, dtype = tensors_of(call), call["dtype"]
    options = {name: call[name] for name in ("stride", "dilation", "groups")}
    steps = {**options, "sides": call["sides"], "modes": call["modes"]}
    exact, exact_grads = run(eager, tensors, torch.float64, **steps)
    plain, plain_grads = run(eager, tensors, dtype, **steps)
    ours = {**options, "padding": call["sides"], "padding_mode": call["modes"], "stats_groups": call["stats_groups"]}
    result, grads = run(conv3d, tensors, dtype, **ours)
    y = result[0] if call["stats_groups"] else result

    assert y.dtype == dtype
    if settled(y):
        assert_close(y, exact.detach(), plain.detach())
    largest = max(float(g.norm()) for g in exact_grads.values())
    for name, grad in filter(lambda item: settled(item[1]), grads.items()):
        assert_close(grad, exact_grads[name], plain_grads[name], ratio=GRADIENT_RATIO,
                     least_scale=GRADIENT_SCALE * largest, what=f"gradient of {name}")  # fmt: skip
    last = reference.is_channels_last(tensors["x"]) or reference.is_channels_last(tensors["weight"])
    assert y.is_contiguous(memory_format=CHANNELS_LAST if last else torch.contiguous_format) or y.numel() == 0
    if call["stats_groups"]:
        hold_statistics(result[1], y, call["stats_groups"])
    with torch.no_grad():
        again = conv3d(**tensors, **ours)
    torch.testing.assert_close(again[0] if call["stats_groups"] else again, y)


def settled(t: torch.Tensor) -> bool:
    """Whether t's relative error is an average: of a few 16-bit values, one rounding the other way decides it."""
    return t.dtype in (torch.float32, torch.float64) or t.numel() == 0 or t.numel() >= 64


def hold_statistics(stats: torch.Tensor, y: torch.Tensor, groups: int) -> None:
    """Mean and centred sum of squares are those of y as it was rounded, and constants."""
    assert stats.shape == (y.shape[0], groups, 2)
    assert stats.dtype == (torch.float64 if y.dtype == torch.float64 else torch.float32)
    assert not stats.requires_grad
    values = y.detach().double().reshape(y.shape[0], groups, y[0].numel() // groups if len(y) else 1)
    rows = values.to(stats.dtype)
    exact, plain = ((v.mean(-1), (v - v.mean(-1, keepdim=True)).square().sum(-1)) for v in (values, rows))
    for i, what in enumerate(("mean", "sum of squares")):
        assert_close(stats[..., i], exact[i], plain[i], least_scale=float(values.norm()), what=what)


@pytest.mark.parametrize("weight_layout", FORMATS[:2])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3)], ids=str)
def test_output_format_follows_x_or_the_weight(kernel: tuple[int, ...], layout: str, weight_layout: str) -> None:
    x = laid_out(torch.randn(2, 8, 7, 5, 3), layout)
    weight = laid_out(torch.randn(6, 8, *kernel), weight_layout)
    y = conv3d(x, weight, padding="same", residual=torch.randn(2, 6, 7, 5, 3))
    last = "channels_last" in layout or (weight_layout == "channels_last" and kernel != (1, 1, 1))
    assert y.is_contiguous(memory_format=CHANNELS_LAST if last else torch.contiguous_format)
    assert not last or not y.is_contiguous()


@pytest.mark.parametrize("kernel", KERNELS[:4], ids=str)
def test_a_batch_of_one_keeps_the_strides_that_torch_recognises(kernel: tuple[int, ...]) -> None:
    x = laid_out(torch.randn(2, 8, 7, 5, 3), "channels_last")[:1]
    expected = torch.empty_like(x, memory_format=CHANNELS_LAST).stride()
    odd = x.as_strided(x.shape, (1, *x.stride()[1:]))
    for clip in (x, odd):
        assert conv3d(clip, torch.randn(8, 8, *kernel), padding="same").stride() == expected


@pytest.mark.parametrize("layout", FORMATS[:2])
def test_vmap(layout: str) -> None:
    clips, weight = torch.randn(3, 2, 4, 3, 5, 5), torch.randn(6, 4, 3, 3, 3)
    clips = laid_out(clips.flatten(0, 1), layout).unflatten(0, (3, 2))
    mapped = torch.vmap(lambda x: conv3d(x, weight, padding=1))(clips)
    folded = conv3d(clips.flatten(0, 1), weight, padding=1).unflatten(0, (3, 2))
    exact = eager(clips.flatten(0, 1).double(), weight.double(), sides=(1,) * 6).unflatten(0, (3, 2))
    assert_close(mapped, exact, folded)


@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("layout", FORMATS[:2])
def test_bias_gradient_is_as_exact_as_a_sum_on_one_thread(layout: str, kernel: tuple[int, int, int]) -> None:
    """oneDNN's own would be 2e-6 off here: it is one chain of 16,384 sums."""
    threads = torch.get_num_threads()
    x, bias = laid_out(torch.randn(1, 8, 16, 32, 32), layout), torch.randn(8, requires_grad=True)
    try:
        torch.set_num_threads(1)
        y = conv3d(x, torch.randn(8, 8, *kernel), bias, padding="same")
        grad = laid_out(torch.randn(y.shape), layout)
        (found,) = torch.autograd.grad(y, bias, grad)
    finally:
        torch.set_num_threads(threads)
    expected = grad.double().sum((0, 2, 3, 4))
    assert (found - expected).norm() / expected.norm() < 5e-7


@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3)], ids=str)
def test_an_activation_may_overwrite_the_result(kernel: tuple[int, int, int]) -> None:
    x, weight, bias = torch.randn(2, 4, 3, 5, 5), torch.randn(4, 4, *kernel), torch.randn(4)
    grads = []
    for overwrite in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        F.relu(conv3d(*leaves, padding="same"), inplace=overwrite).square().sum().backward()
        grads.append([t.grad for t in leaves])
    torch.testing.assert_close(*grads)


def test_forward_mode_and_a_gradient_within_vmap_reach_the_bias() -> None:
    x, weight = torch.randn(3, 2, 4, 2, 5, 5).double(), torch.randn(3, 4, 1, 3, 3).double()
    bias, along = torch.randn(3).double(), torch.randn(3).double()

    def call(bias: torch.Tensor) -> torch.Tensor:
        return conv3d(x[0], weight, bias, padding="same", impl="reference")

    _, tangent = torch.func.jvp(call, (bias.requires_grad_(),), (along,))
    with forward_ad.dual_level():
        dual = call(forward_ad.make_dual(bias, along))
        for each in (tangent, forward_ad.unpack_dual(dual).tangent):
            torch.testing.assert_close(each, along.view(1, 3, 1, 1, 1).expand_as(each))
    grads = torch.vmap(
        torch.func.grad(lambda b, t: conv3d(t, weight, b, padding="same", impl="reference").square().sum()), (None, 0)
    )(bias, x)
    for each, clip in zip(grads, x, strict=True):
        y = F.conv3d(clip, weight, bias, padding="same")
        torch.testing.assert_close(each, 2 * y.sum((0, 2, 3, 4)))


@pytest.mark.parametrize("channels", [40, 320])
@pytest.mark.parametrize("frames", [1, 7, 25])
def test_usual_channel_counts(channels: int, frames: int) -> None:
    x = laid_out(torch.randn(1, channels, frames, 3, 5), "channels_last").requires_grad_()
    weight = (torch.randn(channels, channels, 3, 1, 1) / channels**0.5).requires_grad_()
    tensors = {"x": x, "weight": weight}
    exact, exact_grads = run(eager, tensors, torch.float64, sides=(1, 1, 0, 0, 0, 0))
    plain, plain_grads = run(eager, tensors, torch.float32, sides=(1, 1, 0, 0, 0, 0))
    y, grads = run(conv3d, tensors, torch.float32, padding=(1, 0, 0))
    assert_close(y, exact.detach(), plain.detach())
    for name, grad in grads.items():
        assert_close(grad, exact_grads[name], plain_grads[name], ratio=GRADIENT_RATIO, what=name)


@pytest.mark.parametrize(("padding", "sides"), [
    (2, (2,) * 6), ((0, 1, 2), (0, 0, 1, 1, 2, 2)), ((2, 0, 0, 1, 1, 0), (2, 0, 0, 1, 1, 0)), ("valid", (0,) * 6),
    ("same", (1, 1, 0, 1, 1, 2)),
], ids=str)  # fmt: skip
def test_ways_to_write_padding(padding: Any, sides: tuple[int, ...]) -> None:
    x, weight = torch.randn(1, 2, 6, 6, 6), torch.randn(3, 2, 3, 2, 4)
    y = conv3d(x, weight, padding=padding)
    assert_close(y, eager(x.double(), weight.double(), sides=sides), eager(x, weight, sides=sides))


def test_prefix_makes_streamed_decoding_equal_to_the_whole_clip() -> None:
    x, weight = torch.randn(2, 4, 9, 5, 5), torch.randn(6, 4, 3, 3, 3)
    causal = {"padding": (2, 0, 1, 1, 1, 1), "padding_mode": ("replicate", "zeros", "zeros")}
    whole = conv3d(x, weight, **causal)
    parts = [conv3d(x[:, :, :4], weight, **causal)]
    parts += [conv3d(x[:, :, i : i + 1], weight, prefix=x[:, :, i - 2 : i], **causal) for i in range(4, 9)]
    assert_close(torch.cat(parts, 2), eager(x.double(), weight.double(), sides=causal["padding"],
                                            modes=causal["padding_mode"]), whole)  # fmt: skip


def test_statistics_hold_far_from_zero_and_serve_the_next_norm() -> None:
    x, weight = torch.randn(2, 8, 4, 6, 6), torch.zeros(8, 8, 1, 1, 1)
    weight[range(8), range(8)] = 1.0
    y, stats = conv3d(x, weight, torch.full((8,), 1e4), stats_groups=4)
    hold_statistics(stats, y, 4)
    torch.testing.assert_close(group_norm_silu(y, 4, stats=stats), group_norm_silu(y, 4), rtol=1e-3, atol=1e-3)


def small_float32(kernel: tuple[int, ...], layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    return laid_out(torch.randn(1, 16, 6, 8, 8), layout), torch.randn(8, 16, *kernel)


@pytest.mark.parametrize("layout", FORMATS[:2])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1), (3, 3, 3)], ids=str)
def test_small_float32_clips_do_not_reach_slow_conv3d(
    kernel: tuple[int, ...], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = small_float32(kernel, layout)
    sides = tuple(k // 2 for k in kernel for _ in range(2))
    exact, plain = eager(x.double(), weight.double(), sides=sides), eager(x, weight, sides=sides)
    monkeypatch.setattr(F, "conv3d", lambda *args, **kwargs: pytest.fail("F.conv3d takes slow_conv3d here"))
    assert_close(conv3d(x, weight, padding="same"), exact, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_fast_16_bit_units_the_convolution_runs_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "FAST_ON_CPU", (torch.float32, torch.float64))
    seen = []
    convolve = reference._convolve
    monkeypatch.setattr(reference, "_convolve", lambda x, *rest: seen.append(x.dtype) or convolve(x, *rest))
    x, weight = (t.to(dtype) for t in (torch.randn(2, 4, 3, 5, 5), torch.randn(4, 4, 3, 3, 3)))
    y = conv3d(x, weight, residual=torch.randn(2, 4, 1, 3, 3, dtype=dtype))
    assert seen == [torch.float32]
    assert y.dtype == dtype


@pytest.mark.parametrize("layout", FORMATS[:2])
def test_bfloat16_with_a_stride_over_one_column(layout: str) -> None:
    for kernel, width, padding in (((1, 3, 3), 3, 0), ((3, 3, 3), 2, 1), ((1, 1, 1), 2, 0), ((1, 4, 4), 4, 0)):
        x = laid_out(torch.randn(1, 8, 4, 9, width), layout).bfloat16()
        weight = torch.randn(8, 8, *kernel).bfloat16()
        sides = tuple(min(padding, k // 2) for k in kernel for _ in range(2))
        steps = {"stride": (1, 2, 3), "sides": sides}
        y = conv3d(x, weight, stride=(1, 2, 3), padding=sides)
        assert y.shape[4] == 1
        exact, plain = (eager(x.to(d), weight.to(d), **steps) for d in (torch.float64, torch.float32))
        assert_close(y, exact, plain.bfloat16())


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", FORMATS[:2])
@pytest.mark.parametrize("kernel", [(3, 1, 1), (3, 3, 3), (5, 3, 3), (1, 5, 5)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_bfloat16_weight_gradient_of_clips_shorter_than_the_kernel(
    groups: int, kernel: tuple[int, ...], layout: str, frames: int
) -> None:
    tensors = {
        "x": laid_out(torch.randn(2, 8 * groups, frames, frames, 5), layout).bfloat16(),
        "weight": torch.randn(6, 8, *kernel).bfloat16(),
    }
    sides = tuple(k // 2 for k in kernel for _ in range(2))
    _, exact = run(eager, tensors, torch.float64, groups=groups, sides=sides)
    _, plain = run(eager, tensors, torch.bfloat16, groups=groups, sides=sides)
    _, grads = run(conv3d, tensors, torch.bfloat16, groups=groups, padding=sides)
    for name, grad in grads.items():
        assert_close(grad, exact[name], plain[name], ratio=GRADIENT_RATIO, what=f"gradient of {name}")


def test_one_thread() -> None:
    torch.set_num_threads(1)
    for kernel in ((1, 1, 1), (3, 1, 1), (1, 3, 3)):
        for layout in FORMATS[:2]:
            x, weight = small_float32(kernel, layout)
            exact = eager(x.double(), weight.double())
            assert_close(conv3d(x, weight), exact, eager(x, weight))


def test_autocast_gives_its_dtype_and_leaves_parameters_alone() -> None:
    x, weight = torch.randn(2, 8, 3, 5, 5), torch.randn(8, 8, 1, 3, 3, requires_grad=True)
    bias, residual = torch.randn(8, requires_grad=True), torch.randn(2, 8, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv3d(x, weight, bias, residual=residual)
        baseline = F.conv3d(x, weight, bias) + residual.bfloat16()
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    rounded = [t.detach().bfloat16().double() for t in (x, weight, bias, residual)]
    assert_close(y, eager(*rounded[:3], residual=rounded[3]), baseline)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3d(x.double(), weight).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parameters_of_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 3, 5, 5).bfloat16()
    others = {"weight": torch.randn(6, 4, 3, 3, 3), "bias": torch.randn(6), "channel_bias": torch.randn(2, 6)}
    y = conv3d(x, **{name: t.to(dtype) for name, t in others.items()})
    assert y.dtype == torch.bfloat16
    rounded = {name: t.bfloat16() for name, t in others.items()}
    exact = eager(x.double(), **{name: t.double() for name, t in rounded.items()})
    assert_close(y, exact, eager(x, **rounded))


@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("layout", FORMATS[:2])
def test_compiled_without_a_graph_break(kernel: tuple[int, ...], layout: str) -> None:
    x, weight = small_float32(kernel, layout)
    tensors = {"x": x, "weight": weight, "bias": torch.randn(8), "channel_bias": torch.randn(1, 8)}
    compiled = torch.compile(conv3d, fullgraph=True, backend="aot_eager")
    expected, expected_grads = run(conv3d, tensors, torch.float32, padding=(2, 0, 0, 0, 0, 0), stats_groups=2)
    got, grads = run(compiled, tensors, torch.float32, padding=(2, 0, 0, 0, 0, 0), stats_groups=2)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grads, expected_grads)
    assert got[0].is_contiguous(memory_format=CHANNELS_LAST if "last" in layout else torch.contiguous_format)


def test_few_recompiles_over_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(conv3d, fullgraph=True, backend=counter)
    weight = torch.randn(8, 8, 3, 3, 3)
    for size in (4, 5, 6, 7, 8):
        compiled(torch.randn(2, 8, size, size + 1, size + 2), weight, padding=1)
    assert counter.frame_count <= 3  # the first, and at most two more


def test_second_derivatives() -> None:
    x = torch.randn(1, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return conv3d(x, weight, padding=(1, 0, 0, 1, 1, 1), channel_bias=bias)

    assert torch.autograd.gradgradcheck(call, (x, weight, bias))


def test_arguments_are_left_as_they_were_and_runs_repeat() -> None:
    x, weight, residual = torch.randn(2, 4, 3, 5, 5), torch.randn(4, 4, 1, 3, 3), torch.randn(2, 4, 3, 5, 5)
    tensors = {"x": x, "weight": weight, "residual": residual, "channel_bias": torch.randn(2, 4)}
    before = {name: t.clone() for name, t in tensors.items()}
    with torch.no_grad():
        first = conv3d(**tensors, padding="same")
        second = conv3d(**tensors, padding="same")
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], t) for name, t in tensors.items())


def test_nan_is_carried() -> None:
    x = torch.zeros(1, 2, 3, 4, 4)
    x[0, 0, 1, 2, 2] = float("nan")
    y = conv3d(x, torch.ones(2, 2, 1, 1, 1))
    assert torch.isnan(y).sum() == 2


def test_explained() -> None:
    walks = dispatch.trace(conv3d, torch.randn(1, 2, 3, 3, 3), torch.randn(2, 2, 1, 1, 1))
    assert [walk.chosen for walk in walks if walk.op == "conv3d"] == ["reference"]


X, WEIGHT = torch.zeros(2, 4, 3, 6, 6), torch.zeros(8, 4, 3, 3, 3)
BAD = {
    "x a list": ({"x": [1.0]}, TypeError, r"conv3d: x: expected a tensor, got \[1.0\]"),
    "x int": ({"x": X.int()}, TypeError, "conv3d: x: expected dtype .* got torch.int32"),
    "x 4-D": ({"x": X[0]}, ValueError, r"conv3d: x: expected \(B, C, T, H, W\), got shape \(4, 3, 6, 6\)"),
    "weight 4-D": ({"weight": WEIGHT[0]}, ValueError, r"conv3d: weight: expected \(C_out, C / groups, kT"),
    "weight channels": ({"weight": WEIGHT[:, :3]}, ValueError, r"weight: .* \(8, 4, 3, 3, 3\), got \(8, 3, 3, 3, 3\)"),
    "weight device": ({"weight": WEIGHT.to("meta")}, ValueError, "weight: expected a tensor on cpu as x, got meta"),
    "weight too large": ({"x": X[:, :, :2]}, ValueError, r"weight: expected a kernel that fits .* got \(3, 3, 3\)"),
    "groups": ({"groups": 3}, ValueError, "groups: expected a divisor of C = 4 and of C_out = 8, got 3"),
    "bias": ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(C_out,\) = \(8,\), got \(4,\)"),
    "stride 0": ({"stride": 0}, ValueError, "stride: expected a whole number >= 1, or 3 of them, got 0"),
    "stride pair": ({"stride": (1, 2)}, ValueError, r"stride: .* got \(1, 2\)"),
    "dilation float": ({"dilation": 1.5}, ValueError, "dilation: .* got 1.5"),
    "padding negative": ({"padding": -1}, ValueError, "padding: expected a whole number >= 0, or 3 or 6 of them"),
    "padding word": ({"padding": "full"}, ValueError, "padding: expected 'same', 'valid', or numbers, got 'full'"),
    "same with stride": ({"padding": "same", "stride": 2}, ValueError, "stride: expected 1 with padding='same', got 2"),
    "mode": ({"padding_mode": "reflect"}, ValueError, "padding_mode: expected 'zeros' or 'replicate', .* 'reflect'"),
    "modes": ({"padding_mode": ("zeros",) * 2}, ValueError, r"padding_mode: .* got \('zeros', 'zeros'\)"),
    "replicate nothing": (
        {"x": X[:, :, :0], "padding": (3, 0, 0, 0, 0, 0), "padding_mode": "replicate"}, ValueError,
        "x: expected T of at least 1, for padding_mode 'replicate' to repeat, got 0",
    ),
    "prefix": ({"prefix": X, "padding": (2, 0, 0, 0, 0, 0)}, ValueError, r"prefix: .* \(2, 4, 2, 6, 6\), got"),
    "channel_bias": ({"channel_bias": torch.zeros(2, 4)}, ValueError, r"channel_bias: .* \(2, 8\) or \(2, 8, 1\), got"),
    "residual": ({"residual": X}, ValueError, r"residual: .* \(2, 8, 1, 4, 4\), got \(2, 4, 3, 6, 6\)"),
    "stats_groups": ({"stats_groups": 3}, ValueError, "stats_groups: expected 0, or a divisor of C_out = 8, got 3"),
    "impl": ({"impl": "cpu"}, ValueError, "conv3d: impl: expected one of .*'reference', got 'cpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        conv3d(**{"x": X, "weight": WEIGHT, **change})
