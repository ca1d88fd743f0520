"""norm_silu_conv3d against the norm and the convolution written out in float64, and what its backward keeps."""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastvdiff import dispatch
from fastvdiff.ops import conv3d, group_norm_silu, norm_silu_conv3d
from tests.closeness import GRADIENT_RATIO, GRADIENT_SCALE, assert_close

CHANNELS_LAST = torch.channels_last_3d
TENSORS = ("norm_weight", "norm_bias", "bias", "scale", "shift", "residual")


def eager(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, *, padding: tuple[int, int, int], silu: bool = True,
    norm_weight: Any = None, norm_bias: Any = None, bias: Any = None, scale: Any = None, shift: Any = None,
    residual: Any = None,
) -> torch.Tensor:  # fmt: skip
    """Step by step, in the dtype of the arguments."""
    h = F.group_norm(x, num_groups, norm_weight, norm_bias)
    h = h if scale is None else h * (1 + scale.reshape(*scale.shape, *(1,) * (5 - scale.dim())))
    h = h if shift is None else h + shift.reshape(*shift.shape, *(1,) * (5 - shift.dim()))
    h = F.silu(h) if silu else h
    # Padded beforehand: torch's own padding breaks the bfloat16 weight gradient of short clips.
    y = F.conv3d(F.pad(h, [p for side in reversed(padding) for p in (side, side)]), weight, bias)
    return y if residual is None else y + residual


def drawn(
    batch: int, channels: int, sizes: tuple[int, ...], kernel: tuple[int, ...], dtype: torch.dtype,
    names: frozenset[str], last: bool, per_frame: bool,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The tensors of one call."""
    generator = torch.Generator().manual_seed(batch + channels)
    modulation = (batch, channels, sizes[0]) if per_frame else (batch, channels)
    shapes = {
        "x": (batch, channels, *sizes), "weight": (6, channels, *kernel), "norm_weight": (channels,),
        "norm_bias": (channels,), "bias": (6,), "scale": modulation, "shift": modulation,
        "residual": (batch, 6, *sizes),
    }  # fmt: skip
    found = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items() if name in names | {"x", "weight"}
    }  # fmt: skip
    if last:
        found["x"] = found["x"].contiguous(memory_format=CHANNELS_LAST)
    return found


def run(op: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The result on fresh leaves in `dtype`, and the gradient of each under one cotangent."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    y = op(**leaves, **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16).to(dtype)
    return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), cotangent), strict=True))


def ours(norm_weight: Any = None, norm_bias: Any = None, **arguments: Any) -> Any:
    """norm_silu_conv3d with its optional tensors by name."""
    return norm_silu_conv3d(norm_weight=norm_weight, norm_bias=norm_bias, **arguments)


@settings(max_examples=300)
@given(
    batch=st.integers(0, 2), channels=st.sampled_from([4, 8, 40]), frames=st.integers(1, 5), height=st.integers(2, 6),
    width=st.integers(1, 7), kernel=st.sampled_from([(1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3)]), last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), silu=st.booleans(),
    per_frame=st.booleans(), names=st.frozensets(st.sampled_from(TENSORS)),
    impl=st.sampled_from([None, "reference", "unfused"]),
)  # fmt: skip
def test_drawn_calls(
    batch: int, channels: int, frames: int, height: int, width: int, kernel: tuple[int, int, int], last: bool,
    dtype: torch.dtype, silu: bool, per_frame: bool, names: frozenset[str], impl: str | None,
) -> None:  # fmt: skip
    if dtype == torch.float64 and impl == "unfused":
        impl = None
    if "norm_bias" in names:
        names |= {"norm_weight"}  # torch's own backward fails on a bias without a weight
    tensors = drawn(batch, channels, (frames, height, width), kernel, dtype, names, last, per_frame)
    options = {"num_groups": 4, "silu": silu, "padding": tuple(k // 2 for k in kernel)}
    exact, exact_grads = run(eager, tensors, torch.float64, **options)
    plain, plain_grads = run(eager, tensors, dtype, **options)
    y, grads = run(ours, tensors, dtype, impl=impl, **options)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=CHANNELS_LAST if last else torch.contiguous_format) or y.numel() == 0
    largest = max(float(g.norm()) for g in exact_grads.values())
    for name, value in {"output": y, **grads}.items():
        # Of a few 16-bit values, one that rounds the other way decides the error.
        if value.numel() >= 64 or value.element_size() > 2:
            oracle, baseline = (exact, plain) if name == "output" else (exact_grads[name], plain_grads[name])
            limits = {} if name == "output" else {"ratio": GRADIENT_RATIO, "least_scale": GRADIENT_SCALE * largest}
            assert_close(value, oracle, baseline, what=name, **limits)


@pytest.mark.parametrize("impl", ["cpu", "unfused", "reference"])
def test_options_of_the_convolution_and_statistics(impl: str) -> None:
    x, weight = torch.randn(2, 8, 5, 6, 6), torch.randn(6, 8, 3, 3, 3)
    convolution = {"stride": (1, 2, 2), "padding": (2, 0, 1, 1, 1, 1), "prefix": torch.randn(2, 8, 2, 6, 6),
                   "padding_mode": ("zeros", "replicate", "zeros"), "channel_bias": torch.randn(2, 6, 5)}  # fmt: skip
    y, stats = norm_silu_conv3d(x, 4, None, None, weight, **convolution, stats_groups=3, impl=impl)
    h = group_norm_silu(x, 4, impl="reference" if impl == "reference" else "cpu")
    expected, expected_stats = conv3d(h, weight, **convolution, stats_groups=3)
    assert torch.equal(y, expected)
    assert torch.equal(stats, expected_stats)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_only_the_input_is_kept_for_the_backward(impl: str) -> None:
    x = torch.randn(1, 8, 4, 8, 8, requires_grad=True)
    weight = torch.randn(8, 8, 1, 3, 3, requires_grad=True)
    kept = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = norm_silu_conv3d(x, 4, None, None, weight, padding="same", impl=impl)
    large = [t for t in kept if t.numel() >= x.numel()]
    assert all(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in large)
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


@pytest.mark.parametrize("convolution", ["cpu_winograd", "reference"])
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_unfused_keeps_nothing_of_the_activation(convolution: str, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a view of it; the backward makes it again, once for each time that it is read."""
    module = importlib.import_module("fastvdiff.ops.norm_silu_conv3d")
    made: list[weakref.ref[Any]] = []

    def noted(*args: Any, **named: Any) -> torch.Tensor:
        h = group_norm_silu(*args, **named)
        made.append(weakref.ref(h.untyped_storage()))
        return h

    monkeypatch.setattr(module, "group_norm_silu", noted)
    x = torch.randn(1, 32, 4, 8, 8)
    x = x.contiguous(memory_format=CHANNELS_LAST if last else torch.contiguous_format).requires_grad_()
    weight = torch.randn(32, 32, 1, 3, 3, requires_grad=True)
    with dispatch.use_impl(conv3d=convolution):
        y = norm_silu_conv3d(x, 4, None, None, weight, padding="same", impl="unfused")
    assert len(made) == 1
    assert made[0]() is None
    found = torch.autograd.grad(y.sum(), (x, weight))
    assert len(made) > 1
    expected = torch.autograd.grad(norm_silu_conv3d(x, 4, None, None, weight, padding="same", impl="reference").sum(),
                                   (x, weight))  # fmt: skip
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_unfused_leaves_a_checkpoint_its_memory() -> None:
    """What a checkpoint drops is not kept by the op instead."""
    kept: list[weakref.ref[Any]] = []
    leaf, weight = torch.randn(1, 8, 3, 5, 5, requires_grad=True), torch.randn(8, 8, 1, 3, 3, requires_grad=True)

    def block(t: torch.Tensor) -> torch.Tensor:
        x = t.sin()
        kept.append(weakref.ref(x.untyped_storage()))
        return norm_silu_conv3d(x, 4, None, None, weight, padding="same", impl="unfused")

    y = checkpoint(block, leaf, use_reentrant=False)
    assert kept[0]() is None
    found = torch.autograd.grad(y.sum(), (leaf, weight))
    expected = torch.autograd.grad(block(leaf).sum(), (leaf, weight))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_unfused_refuses() -> None:
    x, weight = torch.randn(1, 8, 3, 5, 5, requires_grad=True), torch.randn(8, 8, 1, 3, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="neither group_norm_silu nor conv3d has a kernel"):
        norm_silu_conv3d(x.double(), 4, None, None, weight, padding="same", impl="unfused")
    x = x.contiguous(memory_format=CHANNELS_LAST)
    y = norm_silu_conv3d(x, 4, None, None, weight, padding="same", impl="unfused")
    with pytest.raises(NotImplementedError, match=r"no second derivative.*reference"):
        torch.autograd.grad(y.square().sum(), weight, create_graph=True)


def test_autocast() -> None:
    x, weight = torch.randn(1, 8, 3, 5, 5), torch.randn(8, 8, 1, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm_silu_conv3d(x, 4, torch.ones(8), torch.zeros(8), weight, padding="same")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", ["cpu", "unfused", "reference"])
def test_compiled_without_a_graph_break(impl: str) -> None:
    tensors = drawn(2, 8, (3, 5, 5), (3, 3, 3), torch.float32, frozenset(TENSORS), True, False)
    options = {"num_groups": 4, "padding": 1, "impl": impl}
    expected = run(ours, tensors, torch.float32, **options)
    torch.testing.assert_close(run(torch.compile(ours, fullgraph=True, backend="aot_eager"), tensors, torch.float32,
                                   **options), expected)  # fmt: skip


X, WEIGHT = torch.zeros(2, 4, 3, 6, 6), torch.zeros(8, 4, 3, 3, 3)
BAD = {
    "x": ({"x": X[0]}, r"norm_silu_conv3d: x: expected \(B, C, T, H, W\), got shape \(4, 3, 6, 6\)"),
    "one value": ({"x": X[:, :, :1, :1, :1], "num_groups": 4, "padding": 1}, "x: expected more than one value"),
    "num_groups": ({"num_groups": 3}, "num_groups: expected a divisor of C = 4, got 3"),
    "norm_weight": ({"norm_weight": torch.zeros(3)}, r"norm_weight: expected shape \(C,\) = \(4,\), got \(3,\)"),
    "scale": ({"scale": torch.zeros(2, 3)}, r"scale: .* \(2, 4\) or \(2, 4, 3\), got \(2, 3\)"),
    "stats": ({"stats": torch.zeros(2, 4, 2)}, r"stats: .* \(2, 2, 2\), got \(2, 4, 2\)"),
    "weight": ({"weight": WEIGHT[:, :3]}, r"norm_silu_conv3d: weight: .* got \(8, 3, 3, 3, 3\)"),
    "impl": ({"impl": "triton"}, "norm_silu_conv3d: impl: expected one of .*'reference', got 'triton'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    change, message = BAD[name]
    call = {"x": X, "num_groups": 2, "norm_weight": None, "norm_bias": None, "weight": WEIGHT, **change}
    with pytest.raises(ValueError, match=message):
        norm_silu_conv3d(**call)
