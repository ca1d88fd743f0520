"""conv3d's CUDA kernels on a CPU: every pass, dtype and way to load, against F.conv3d in float64.

Each case runs in both thread orders, which agree to the bit, and once more in the builds that see races and overruns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastvdiff.native import norm_silu_conv3d_cuda
from fastvdiff.reference import conv3d as reference
from tests.closeness import GRADIENT_RATIO, GRADIENT_SCALE, assert_close
from tests.ops.test_conv3d import eager, hold_statistics, laid_out, run

from .conv3d_library import native, shim
from .host import BUILDS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SAME = {k: tuple(n // 2 for n in k for _ in "01") for k in ((1, 3, 3), (3, 1, 1), (3, 3, 3))}


def case(channels: int, outputs: int, size: tuple[int, ...], kernel: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """A convolution: what `options` leaves out is plain."""
    plain = {
        "batch": 1, "stride": (1, 1, 1), "sides": SAME.get(kernel, (0,) * 6), "dilation": (1, 1, 1),
        "modes": ("zeros",) * 3, "prefix": False, "bias": True, "channel_bias": 0, "residual": False, "groups": 0,
        "layout": "channels_last", "channels_last": True,
    }  # fmt: skip
    return plain | {"channels": channels, "outputs": outputs, "size": size, "kernel": kernel} | options


CASES = {
    "1x1x1": case(16, 24, (2, 5, 7), (1, 1, 1), batch=3, residual=True),
    "1x3x3": case(40, 72, (2, 6, 7), (1, 3, 3), channel_bias=2),
    "3x1x1": case(64, 64, (7, 3, 5), (3, 1, 1), batch=2, channel_bias=3, residual=True),
    "3x3x3, two tiles each way": case(16, 136, (3, 5, 9), (3, 3, 3), groups=8),
    "one frame": case(24, 16, (1, 9, 8), (3, 3, 3), batch=2, groups=4),
    "3 channels": case(3, 40, (2, 9, 9), (1, 7, 7), sides=(0, 0, 3, 3, 3, 3)),
    "4 channels, both ways": case(4, 3, (3, 5, 6), (3, 3, 3), batch=2, channel_bias=3, residual=True, groups=3),
    "down": case(16, 32, (2, 8, 10), (1, 4, 4), stride=(1, 2, 2), sides=(0, 0, 1, 1, 1, 1), bias=False),
    "stride past dilation": case(8, 8, (7, 7, 9), (2, 3, 3), stride=(3, 2, 2), dilation=(1, 2, 2),
                                 sides=(1, 0, 2, 2, 0, 3)),
    "stride without taps": case(8, 8, (5, 6, 7), (1, 1, 1), stride=(2, 3, 2), batch=2),
    "dilated": case(8, 24, (5, 7, 8), (3, 3, 2), dilation=(2, 2, 1), sides=(2, 2, 2, 2, 0, 1)),
    "causal": case(16, 16, (4, 5, 6), (3, 3, 3), sides=(2, 0, 1, 1, 1, 1), groups=2,
                   modes=("replicate", "zeros", "zeros")),
    "replicate": case(8, 16, (2, 1, 6), (3, 3, 3), sides=(1, 2, 2, 1, 1, 1), stride=(1, 1, 2),
                      modes=("replicate",) * 3),
    "prefix": case(16, 8, (3, 5, 6), (3, 3, 3), sides=(2, 0, 1, 1, 1, 1), prefix=True, batch=2, residual=True),
    "prefix of 3 channels": case(3, 8, (3, 4, 6), (3, 1, 1), sides=(2, 1, 0, 0, 0, 0), prefix=True,
                                 modes=("replicate",) * 3),
    "contiguous": case(16, 24, (2, 5, 7), (3, 3, 3), layout="contiguous", channels_last=False, residual=True, groups=6),
    "sliced": case(16, 24, (2, 5, 7), (1, 3, 3), layout="sliced_channels_last", channel_bias=3, groups=1),
}  # fmt: skip


def tensors_of(case: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inputs of a case, in `dtype`."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    batch, channels, outputs, size = case["batch"], case["channels"], case["outputs"], case["size"]
    out_size = sizes_of(case)
    found = {
        "x": laid_out(draw(batch, channels, *size), case["layout"]), "weight": draw(outputs, channels, *case["kernel"]),
    }  # fmt: skip
    if case["bias"]:
        found["bias"] = draw(outputs)
    if case["prefix"]:
        found["prefix"] = laid_out(draw(batch, channels, case["sides"][0], *size[1:]), case["layout"])
    if case["channel_bias"]:
        found["channel_bias"] = draw(batch, outputs, *out_size[: case["channel_bias"] - 2])
    if case["residual"]:
        found["residual"] = laid_out(draw(batch, outputs, *out_size), case["layout"])
    return found


def sizes_of(case: dict[str, Any]) -> tuple[int, ...]:
    return reference.output_sizes(case["size"], case["kernel"], case["stride"], case["sides"], case["dilation"])


def as_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 values as a tensor core reads them; 16-bit ones as they are."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x.float()


def geometry_of(case: dict[str, Any]) -> native.Geometry:
    replicate = tuple(mode == "replicate" for mode in case["modes"])
    return native.Geometry(case["stride"], case["sides"], case["dilation"], replicate)


def kernels(
    case: dict[str, Any], tensors: dict[str, torch.Tensor], prologue: native.Prologue | None = None,
    cotangent: torch.Tensor | None = None, gradients: bool = True,
) -> Any:  # fmt: skip
    """Result, statistics and the gradients of x, weight and prefix, under `cotangent` or that of `run`."""
    x, weight, prefix = tensors["x"], tensors["weight"], tensors.get("prefix")
    geometry = geometry_of(case)
    y, stats = native.forward(
        x, weight, tensors.get("bias"), geometry, prefix, tensors.get("channel_bias"), tensors.get("residual"),
        case["groups"], sizes_of(case), case["channels_last"], prologue,
    )  # fmt: skip
    if prologue is not None or not gradients:
        return y, stats, {}
    if cotangent is None:
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16).to(x.dtype)
    dx, dprefix = native.input_gradient(cotangent, x, weight, geometry, prefix)
    grads = {"x": dx, "weight": native.weight_gradient(cotangent, x, weight, geometry, prefix)}
    if dprefix is not None:
        grads["prefix"] = dprefix
    return y, stats, grads


def in_both_orders(
    case: dict[str, Any], tensors: dict[str, torch.Tensor], prologue: native.Prologue | None = None,
    build: str = "ordinary", gradients: bool = True,
) -> Any:  # fmt: skip
    """`kernels` in either thread order: the same bits. What a kernel accesses does not depend on it: sanitized once."""
    with shim(build):
        y, stats, grads = kernels(case, tensors, prologue, gradients=gradients)
    if build != "sanitized":
        with shim(build, descending=True):
            other_y, other_stats, other_grads = kernels(case, tensors, prologue, gradients=gradients)
        assert torch.equal(y, other_y)
        assert torch.equal(stats, other_stats)
        assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    return y, stats, grads


def hold(case: dict[str, Any], dtype: torch.dtype, build: str = "ordinary", gradients: bool = True) -> None:
    """The kernels on a case are as close to float64 as float32 sums of the same inputs, rounded once."""
    tensors = tensors_of(case, dtype)
    steps = {name: case[name] for name in ("stride", "sides", "dilation", "modes")}
    exact, exact_grads = run(eager, tensors, torch.float64, **steps)
    read = {name: as_tf32(t) if name in ("x", "weight", "prefix") else t for name, t in tensors.items()}
    plain, plain_grads = run(eager, read, torch.float32, **steps)
    y, stats, grads = in_both_orders(case, tensors, None, build, gradients)
    assert_close(y, exact, plain.to(dtype))
    assert y.is_contiguous(memory_format=torch.channels_last_3d if case["channels_last"] else torch.contiguous_format)
    largest = max(float(g.norm()) for g in exact_grads.values())
    for name, grad in grads.items():
        assert_close(grad, exact_grads[name], plain_grads[name].to(dtype), ratio=GRADIENT_RATIO,
                     least_scale=GRADIENT_SCALE * largest, what=f"gradient of {name}")  # fmt: skip
    assert not gradients or grads["x"].stride() == torch.empty_like(tensors["x"]).stride()
    if case["groups"]:
        hold_statistics(stats, y, case["groups"])


# float16 differs from bfloat16 in its conversions and its tensor-core instruction alone: a few cases show both.
RUNS = [(n, d) for i, n in enumerate(CASES) for d in DTYPES if d != torch.float16 or i < 5]


@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_every_pass(name: str, dtype: torch.dtype) -> None:
    hold(CASES[name], dtype)


def hold_shares(build: str = "ordinary") -> None:
    """A weight gradient in shares of the positions, which a kernel of its own adds up."""
    long = case(8, 8, (8, 8, 16), (1, 1, 1))
    tensors = tensors_of(long, torch.float32)
    with shim():
        call = native._of(tensors["x"], tensors["weight"], geometry_of(long), long["size"])
        assert native.library().cuda_conv3d_workspace(2, call.numbers) >= 2 * tensors["weight"].numel()
        assert native.library().cuda_conv3d_workspace(0, call.numbers) == 0
        assert native.library().cuda_conv3d_workspace(1, call.numbers) == 0
    hold(long, torch.float32, build)


def test_a_weight_gradient_in_shares_of_the_positions() -> None:
    hold_shares()


def test_statistics_far_from_zero() -> None:
    far = case(8, 16, (3, 8, 8), (1, 1, 1), groups=4)
    tensors = tensors_of(far, torch.float32)
    tensors["bias"] = torch.full((16,), 1e4)
    y, stats, _ = in_both_orders(far, tensors)
    hold_statistics(stats, y, 4)


def hold_prologue(case: dict[str, Any], frames: int, silu: bool, dtype: torch.dtype, build: str = "ordinary") -> None:
    """A norm on the way in, in whole chunks or element by element, is as close as its activation in torch."""
    generator = torch.Generator().manual_seed(2)
    tensors = tensors_of(case, dtype)
    table = torch.randn((case["batch"], frames, case["channels"], 2), generator=generator)

    def activation(x: torch.Tensor) -> torch.Tensor:
        factor, term = table.to(x.dtype).permute(3, 0, 2, 1)[..., None, None]
        h = x * factor + term
        return F.silu(h) if silu else h

    steps = {"sides": case["sides"]}
    rest = {name: t for name, t in tensors.items() if name != "x"}
    exact = eager(activation(tensors["x"].double()), **{n: t.double() for n, t in rest.items()}, **steps)
    h = as_tf32(activation(tensors["x"].float()).to(dtype))
    sums = eager(h, as_tf32(rest["weight"]), rest["bias"].float(), residual=rest["residual"].float(), **steps)
    y, _, _ = in_both_orders(case, tensors, native.Prologue(table, silu), build)
    assert_close(y, exact, sums.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "frames", "silu"), [(16, 3, True), (16, 1, False), (3, 3, True)], ids=str)
def test_prologue(channels: int, frames: int, silu: bool, dtype: torch.dtype) -> None:
    hold_prologue(case(channels, 24, (3, 5, 6), (3, 3, 3), batch=2, residual=True), frames, silu, dtype)


def hold_prefix_as_it_is(build: str = "ordinary") -> None:
    """A prefix is not activated."""
    plain = CASES["prefix"]
    tensors = tensors_of(plain, torch.bfloat16)
    table = torch.ones((2, 1, 16, 2))
    steps = {name: plain[name] for name in ("stride", "sides", "dilation", "modes")}
    activated = tensors | {"x": tensors["x"].double() + 1}
    exact = eager(**{name: t.double() for name, t in activated.items()}, **steps)
    y, _, _ = in_both_orders(plain, tensors, native.Prologue(table, silu=False), build)
    h = {name: t.float() for name, t in (tensors | {"x": (tensors["x"].float() + 1).bfloat16()}).items()}
    assert_close(y, exact, eager(**h, **steps).bfloat16())


def test_a_prefix_is_not_activated() -> None:
    hold_prefix_as_it_is()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("frames", [(3, 1), (1, 3), None], ids=str)
def test_table_of_a_prologue(frames: tuple[int, int] | None, build: str) -> None:
    """The factor and the term of a norm of known statistics, its affine map and a modulation."""
    x, eps = torch.empty((2, 100, 3, 4, 5)), 1e-3
    weight, bias = (torch.randn(100), torch.randn(100)) if frames else (None, None)
    scale, shift = (
        (torch.randn(2, 100, n) if n > 1 else torch.randn(2, 100) for n in frames) if frames else (None, None)
    )
    stats = torch.stack((torch.randn(2, 5), torch.rand(2, 5) * 1200 + 1), -1)
    with shim(build):
        table = norm_silu_conv3d_cuda._table(x, 5, weight, bias, eps, stats, scale, shift)
    mean, squares = stats.double().repeat_interleave(20, 1)[:, None].unbind(-1)
    factor = (squares / (20 * 60) + eps).rsqrt() * (1.0 if weight is None else weight.double())
    term = (0.0 if bias is None else bias.double()) - mean * factor
    if scale is not None and shift is not None:
        along = [t.double().reshape(2, 100, -1).transpose(1, 2) for t in (scale, shift)]
        factor, term = factor * (1 + along[0]), term * (1 + along[0]) + along[1]
    expected = torch.stack(torch.broadcast_tensors(factor, term), -1)
    torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-5)


WATCHED = pytest.mark.parametrize("build", ["races", "sanitized"])


@WATCHED
@pytest.mark.parametrize(("name", "dtype"), [(n, DTYPES[i % 3]) for i, n in enumerate(CASES)], ids=str)
def test_races_and_overruns(name: str, dtype: torch.dtype, build: str) -> None:
    hold(CASES[name], dtype, build)


@WATCHED
@pytest.mark.parametrize(("channels", "frames", "silu", "dtype"), [
    (16, 3, True, torch.bfloat16), (16, 1, False, torch.float32), (3, 3, True, torch.float16),
], ids=str)  # fmt: skip
def test_races_and_overruns_with_a_prologue(
    channels: int, frames: int, silu: bool, dtype: torch.dtype, build: str
) -> None:
    hold_prologue(case(channels, 24, (3, 5, 6), (3, 3, 3), batch=2, residual=True), frames, silu, dtype, build)


@WATCHED
def test_races_and_overruns_of_a_prefix_and_of_shares(build: str) -> None:
    hold_prefix_as_it_is(build)
    hold_shares(build)


# The fewest tiles for which the launcher takes 128 columns: with 64 a second wave of blocks would begin.
ONE = {"size": (1, 1, 3), "kernel": (1, 1, 1)}
WIDE = {
    "affine": (case(8, 16960, **ONE, residual=True, groups=4), torch.bfloat16),
    "affine, float32": (case(8, 16960, **ONE, channel_bias=2), torch.float32),
    "clamped": (case(8, 16960, **ONE, modes=("replicate",) * 3), torch.float16),
    "prologue": (case(8, 16960, **ONE, residual=True), torch.bfloat16),
    "prologue, float32": (case(8, 16960, **ONE, residual=True), torch.float32),
    "elements": (case(3, 16957, **ONE, residual=True, groups=1), torch.float16),
    "elements, float32": (case(3, 16957, **ONE, channels_last=False, layout="contiguous"), torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", WIDE)
def test_tiles_of_128_columns(name: str, build: str) -> None:
    wide, dtype = WIDE[name]
    sizes = (1, wide["channels"], wide["outputs"], wide["size"], wide["kernel"], geometry_of(wide), dtype)
    with shim():
        assert native.plans(*sizes)["forward"].tile_columns == 128
    if "prologue" in name:
        hold_prologue(wide, 1, True, dtype, build)
    else:
        hold(wide, dtype, build, gradients=False)
