"""conv3d and norm_silu_conv3d with impl="cuda" as a caller meets them, their kernels under the SIMT shim."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.library import opcheck

from fastvdiff import dispatch
from fastvdiff.ops import conv3d, group_norm_silu, norm_silu_conv3d
from fastvdiff.reference.conv3d import moments
from tests.closeness import hold

from .conv3d_library import shim

CHANNELS_LAST = torch.channels_last_3d


@pytest.fixture(autouse=True)
def _on_shim() -> Iterator[None]:
    with shim():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad)


def clip(*shape: int, **options: Any) -> torch.Tensor:
    return draw(*shape, **options).detach().contiguous(memory_format=CHANNELS_LAST).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_everything_at_once(dtype: torch.dtype) -> None:
    """Every argument with a gradient, parameters in float32."""
    y, stats = hold(
        conv3d, clip(2, 8, 3, 5, 6, dtype=dtype), draw(16, 8, 3, 3, 3, dtype=torch.float32),
        draw(16, dtype=torch.float32), padding=(2, 0, 1, 1, 1, 1), padding_mode=("zeros", "replicate", "zeros"),
        prefix=draw(2, 8, 2, 5, 6, dtype=dtype), channel_bias=draw(2, 16, 3),
        residual=draw(2, 16, 3, 5, 6, dtype=dtype), stats_groups=4, impl="cuda", dtype=dtype,
        baseline=lambda *a, **k: conv3d(*a, **k, impl="reference"),
    )  # fmt: skip
    assert y.is_contiguous(memory_format=CHANNELS_LAST)
    assert not stats.requires_grad
    torch.testing.assert_close(stats, moments(y, 4), rtol=1e-4, atol=1e-4)


def test_an_empty_batch() -> None:
    x, weight = clip(0, 8, 3, 5, 6), draw(16, 8, 1, 3, 3)
    y, stats = conv3d(x, weight, draw(16), padding="same", stats_groups=2, impl="cuda")
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == (0, 16, 3, 5, 6)
    assert stats.shape == (0, 2, 2)
    assert dx.shape == x.shape
    assert not dweight.any()


def test_a_prefix_of_no_frames() -> None:
    x, weight, prefix = clip(1, 8, 2, 3, 4), draw(8, 8, 3, 1, 1), draw(1, 8, 0, 3, 4)
    y = conv3d(x, weight, padding=(0, 1, 0, 0, 0, 0), prefix=prefix, impl="cuda")
    assert torch.autograd.grad(y.sum(), prefix)[0].shape == prefix.shape


@pytest.mark.parametrize("last", [True, False], ids=("channels_last", "contiguous"))
def test_opcheck(last: bool) -> None:
    x, weight = (clip if last else draw)(1, 8, 2, 3, 4), draw(8, 8, 1, 3, 3)
    forward, backward = torch.ops.fastvdiff.conv3d, torch.ops.fastvdiff.conv3d_backward
    geometry = ([1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1], [False] * 3, None)
    opcheck(forward, (x, weight, draw(8), *geometry, draw(1, 8), draw(1, 8, 2, 3, 4), 2, "cuda"),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))  # fmt: skip
    opcheck(backward, (draw(1, 8, 2, 3, 4, grad=False), x.detach(), weight.detach(), *geometry, True, True, "cuda"),
            test_utils=("test_schema", "test_faketensor"))  # fmt: skip


def test_compiled_whole() -> None:
    x, weight, bias = clip(1, 8, 2, 3, 4), draw(8, 8, 1, 3, 3), draw(8)

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return conv3d(x, weight, bias, padding=(0, 1, 1), impl="cuda")

    eager = run(x, weight, bias)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, weight, bias)
    assert torch.equal(compiled, eager)
    assert compiled.stride() == eager.stride()
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), (x, weight, bias)) for y in (compiled, eager)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_autocast_takes_float32_clips_to_its_dtype() -> None:
    x, weight = clip(1, 8, 2, 3, 4, dtype=torch.float32), draw(8, 8, 1, 1, 1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv3d(x, weight, impl="cuda")
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.sum(), weight)[0].dtype == torch.float32


def test_a_second_derivative_names_the_reference() -> None:
    x, weight = clip(1, 8, 2, 3, 4), draw(8, 8, 1, 1, 1)
    (dx,) = torch.autograd.grad(conv3d(x, weight, impl="cuda").square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='second derivative; pass impl="reference"'):
        dx.sum().backward()


def test_what_it_does_not_run() -> None:
    x, weight = clip(1, 8, 2, 3, 4, dtype=torch.float32), draw(8, 4, 1, 1, 1, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="no grouped convolution, got groups = 2"):
        conv3d(x, weight, groups=2, impl="cuda")
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "ieee"
        with pytest.raises(NotImplementedError, match=r"fp32_precision = 'ieee' forbids"):
            conv3d(x, draw(8, 8, 1, 1, 1, dtype=torch.float32), impl="cuda")
    finally:
        setting.fp32_precision = before


def test_it_does_not_run_by_itself() -> None:
    dispatch._WARNED.add(("conv3d", "cuda"))
    walk = dispatch.trace(conv3d, clip(1, 8, 2, 3, 4), draw(8, 8, 1, 1, 1))[0]
    assert walk.chosen == "reference"
    assert "not verified" in walk.reasons["cuda"]


def normed(per_frame: bool, grad: bool) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of norm_silu_conv3d with every parameter."""
    modulation = (2, 16, 3) if per_frame else (2, 16)
    args = [clip(2, 16, 3, 5, 6), 4, draw(16), draw(16), draw(8, 16, 3, 3, 3), draw(8)]
    rest = {
        "scale": draw(*modulation), "shift": draw(2, 16), "residual": draw(2, 8, 3, 5, 6), "channel_bias": draw(2, 8),
        "prefix": draw(2, 16, 2, 5, 6), "padding": (2, 0, 1, 1, 1, 1),
    }  # fmt: skip
    if not grad:
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        rest = {name: a.detach() if isinstance(a, torch.Tensor) else a for name, a in rest.items()}
    return args, rest


@pytest.mark.parametrize("with_stats", [False, True], ids=("two kernels", "one kernel"))
@pytest.mark.parametrize("per_frame", [False, True], ids=("(B, C)", "(B, C, T)"))
def test_norm_silu_conv3d(per_frame: bool, with_stats: bool, on_shim: Any) -> None:
    args, rest = normed(per_frame, grad=True)
    if with_stats:
        rest["stats"] = moments(args[0], 4)
    hold(norm_silu_conv3d, *args, impl="cuda", dtype=torch.bfloat16, **rest)


def test_norm_silu_conv3d_compiled_whole(on_shim: Any) -> None:
    args, rest = normed(per_frame=False, grad=True)

    def run(*args: Any) -> torch.Tensor:
        return norm_silu_conv3d(*args, **rest, impl="cuda")

    eager, compiled = run(*args), torch.compile(run, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(compiled, eager)
    leaves = [a for a in args if isinstance(a, torch.Tensor)]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (compiled, eager)), strict=True):
        torch.testing.assert_close(a, b)


def test_norm_silu_conv3d_keeps_x_and_no_activation(on_shim: Any) -> None:
    args, rest = normed(per_frame=False, grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_silu_conv3d(*args, **rest, impl="cuda")
    assert sum(t.shape == args[0].shape for t in kept) == 1


def test_statistics_lead_to_the_next_norm() -> None:
    x, weight = clip(1, 8, 3, 5, 6).detach(), draw(8, 8, 1, 3, 3, grad=False)
    y, stats = conv3d(x, weight, padding=(0, 1, 1), stats_groups=4, impl="cuda")
    norm, _ = norm_silu_conv3d(y, 4, None, None, weight, stats=stats, padding=(0, 1, 1), stats_groups=4, impl="cuda")
    plain = conv3d(group_norm_silu(y, 4, impl="reference"), weight, padding=(0, 1, 1), impl="reference")
    torch.testing.assert_close(norm, plain, rtol=2e-2, atol=2e-2)
