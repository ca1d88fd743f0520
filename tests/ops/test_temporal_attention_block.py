"""temporal_attention_block: every feature against float64, all gradients, layouts, instruction sets, and refusals."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from fastvdiff import dispatch, native
from fastvdiff.ops import temporal_attention_block as block
from tests.closeness import hold
from tests.ops.drawn_temporal_attention_block import calls
from tests.ops.temporal_attention_block_inputs import LAYOUTS, WEIGHTS, in_layout, parameters
from tests.ops.temporal_attention_inputs import NARROW, rotary_tables

MODULE = sys.modules[block.__module__]


@settings(max_examples=330)
@given(calls(), st.sampled_from(native.available_isas()))
def test_drawn_cases(call: tuple[torch.Tensor, dict[str, Any], torch.dtype], isa: str) -> None:
    x, options, dtype = call
    with native.use_isa(isa):
        y = hold(block, x, impl="cpu", dtype=dtype, **options)
    assert y.dtype == dtype
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient(isa: str, dtype: torch.dtype, layout: str) -> None:
    x = in_layout(layout, 2, 24, 7, 5, 9).to(dtype).requires_grad_()
    with native.use_isa(isa):
        hold(block, x, impl="cpu", dtype=dtype, heads=3, rotary=rotary_tables(7, 4), **parameters(24, 3, 8, 7, dtype))


@pytest.mark.parametrize(
    ("shape", "heads", "dim"),
    [((1, 320, 16, 4, 5), 8, 40), ((1, 64, 16, 8, 8), 8, 32), ((3, 40, 1, 9, 31), 2, 20), ((1, 16, 64, 3, 3), 2, 8),
     ((2, 8, 3, 37, 21), 1, 8)],
    ids=str,
)  # fmt: skip
def test_sizes(shape: tuple[int, ...], heads: int, dim: int) -> None:
    options = parameters(shape[1], heads, dim, shape[2])
    hold(block, torch.randn(shape, requires_grad=True), impl="cpu", dtype=torch.float32, heads=heads, **options)


@pytest.mark.parametrize("impl", ["cpu", "unfused", "reference"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", None])
def test_means_what_the_docstring_spells(impl: str, norm: str | None) -> None:
    x, p = torch.randn(2, 16, 5, 3, 4), parameters(16, 2, 8, 5, gradients=False)
    weight, bias = p.pop("norm_weight"), p.pop("norm_bias")
    rows = x.permute(0, 3, 4, 2, 1)
    if norm == "layer_norm":
        p |= {"norm_weight": weight, "norm_bias": bias}
        h = F.layer_norm(rows, (16,), weight, bias, 1e-3)
    elif norm == "rms_norm":
        p |= {"norm_weight": weight}
        h = rows * (rows.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight
    else:
        h = rows
    h = h + p["frame_embedding"]
    q, k, v = (
        F.linear(h, p[f"{n}_weight"], p[f"{n}_bias"]).unflatten(-1, (2, 8)).transpose(-2, -3) for n in ("q", "k", "v")
    )
    y = ((q @ k.mT / math.sqrt(8) + p["attn_bias"]).softmax(-1) @ v).transpose(-2, -3).flatten(-2)
    expected = x + F.linear(y, p["out_weight"], p["out_bias"]).permute(0, 4, 3, 1, 2)
    torch.testing.assert_close(block(x, heads=2, norm=norm, eps=1e-3, impl=impl, **p), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["cpu", "unfused", "reference"])
def test_a_frame_with_nothing_to_attend_to_gives_the_output_bias(impl: str) -> None:
    x, p = torch.randn(1, 8, 4, 3, 5), parameters(8, 2, 4, 4)
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[0, 2] = False
    y = block(x, heads=2, attn_mask=mask, residual=False, impl=impl, **p)
    torch.testing.assert_close(y[:, :, 2], p["out_bias"][None, :, None, None].expand(1, 8, 3, 5))


@pytest.mark.parametrize("impl", ["cpu", "unfused", "reference"])
@pytest.mark.parametrize("shape", [(0, 8, 4, 3, 5), (2, 8, 4, 0, 5), (2, 8, 0, 3, 5)], ids=str)
def test_empty(shape: tuple[int, ...], impl: str) -> None:
    x, p = torch.randn(shape, requires_grad=True), parameters(8, 2, 4, shape[2])
    y = block(x, heads=2, impl=impl, **p)
    assert y.shape == x.shape
    for gradient in torch.autograd.grad(y.sum(), [x, *p.values()], allow_unused=True):
        assert gradient is None or not gradient.any()


def test_large_mean() -> None:
    x = (torch.randn(1, 32, 5, 4, 4) + 1e4).requires_grad_()
    hold(block, x, impl="cpu", dtype=torch.float32, heads=2, residual=False, **parameters(32, 2, 8, 5))


def test_constant_rows_with_no_epsilon_stay_in_their_position() -> None:
    # Lanes past the last position (here 7 of 16) must not bring their 0 / 0 into the sums of the gradients.
    x, p = torch.randn(1, 8, 3, 3, 3, requires_grad=True), parameters(8, 2, 4, 3)
    for gradient in torch.autograd.grad(block(x, heads=2, eps=0.0, impl="cpu", **p).sum(), [x, *p.values()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_non_finite_stays_in_its_position(value: float) -> None:
    x, p = torch.randn(1, 8, 4, 3, 5), parameters(8, 2, 4, 4)
    x[0, 3, 1, 1, 2] = value
    y = block(x, heads=2, impl="cpu", **p)
    assert y[0, :, :, 1, 2].isnan().all()
    y[0, :, :, 1, 2] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [(1, 32, 16, 16, 17), (3, 24, 5, 9, 21)], ids=str)
def test_same_bits_for_any_thread_count(shape: tuple[int, ...], layout: str) -> None:
    x, p = in_layout(layout, *shape).requires_grad_(), parameters(shape[1], 4, 8, shape[2])

    def run(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        y = block(x, heads=4, impl="cpu", **p)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *p.values()])]

    first = run(1)
    for threads in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(threads), strict=True))


def test_gradients_only_where_wanted() -> None:
    x, p = torch.randn(1, 8, 4, 3, 5), parameters(8, 2, 4, 4, gradients=False)
    p["k_weight"].requires_grad_()
    p["attn_bias"].requires_grad_()
    found = torch.autograd.grad(block(x, heads=2, impl="cpu", **p).square().sum(), [p["k_weight"], p["attn_bias"]])
    wanted = torch.autograd.grad(
        block(x, heads=2, impl="reference", **p).square().sum(), [p["k_weight"], p["attn_bias"]]
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_saves_nothing_larger_than_x() -> None:
    x, p = torch.randn(1, 8, 16, 8, 8, requires_grad=True), parameters(8, 4, 16, 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        block(x, heads=4, impl="cpu", **p)
    assert sum(t.numel() >= x.numel() for t in saved) == 1


# ---- registration, compile, autocast ---------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.no_poison
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str, impl: str) -> None:
    x, p = in_layout(layout, 2, 8, 4, 3, 5).requires_grad_(), parameters(8, 2, 4, 4)
    order = ("q_weight", "k_weight", "v_weight", "q_bias", "k_bias", "v_bias", "out_weight", "out_bias",
             "norm_weight", "norm_bias", "frame_embedding", "attn_bias")  # fmt: skip
    mask, (cos, sin) = torch.ones(2, 4, 4, dtype=torch.bool).tril(), rotary_tables(5, 2)
    full = [x, *(p[name] for name in order), 2, "layer_norm", 1e-5, mask, cos, sin, "half", 0.5, True, True, impl]
    bare = [x, *(p[name] if name in WEIGHTS else None for name in order), 2, None, 0.0, None, None, None,
            "interleaved", 0.5, False, False, impl]  # fmt: skip
    op, backward = (getattr(torch.ops.fastvdiff, f"temporal_attention_block{s}").default for s in ("", "_backward"))
    for inputs in (full, bare):
        torch.library.opcheck(op, inputs)
        detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
        torch.library.opcheck(backward, [torch.randn(x.shape), [True, False] * 6, *detached])


@pytest.mark.no_poison
def test_compiles_whole_and_seldom_again() -> None:
    counter = CompileCounter()
    p = parameters(8, 2, 4, 5, gradients=False)

    @torch.compile(backend=counter, fullgraph=True)
    def call(x: torch.Tensor) -> torch.Tensor:
        return block(x, heads=2, impl="cpu", **p) * 2

    for width in (4, 6, 9, 30, 35):
        x = torch.randn(1, 8, 5, 3, width)
        torch.testing.assert_close(call(x), block(x, heads=2, **p) * 2)
    assert counter.frame_count <= 2


@pytest.mark.no_poison
@pytest.mark.parametrize("impl", ["cpu", "unfused", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_gradients(layout: str, impl: str) -> None:
    torch.compiler.reset()  # more impls and layouts than one function may be compiled for
    x, p = in_layout(layout, 1, 8, 5, 3, 6).requires_grad_(), parameters(8, 2, 4, 5)

    def call(x: torch.Tensor) -> torch.Tensor:
        return block(x, heads=2, impl=impl, **p).sin()

    leaves = [x, *p.values()]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert y.stride() == torch.empty_like(x).stride()
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(call(x).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["cpu", "unfused", "reference"])
def test_autocast(impl: str) -> None:
    x, p = torch.randn(1, 8, 5, 3, 6, requires_grad=True), parameters(8, 2, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x, heads=2, impl=impl, **p)
    assert y.dtype == torch.bfloat16
    plain = block(x, heads=2, **p)
    assert float((y - plain).norm() / plain.norm()) < 2e-2
    gradients = torch.autograd.grad(y.float().square().sum(), [x, *p.values()])
    assert all(g.dtype == torch.float32 for g in gradients)


def test_second_derivatives_and_vmap_name_the_reference() -> None:
    x, p = torch.randn(1, 8, 4, 3, 5, requires_grad=True), parameters(8, 2, 4, 4)
    (first,) = torch.autograd.grad(block(x, heads=2, impl="cpu", **p).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative; pass impl="reference"'):
        torch.autograd.grad(first.sum(), x)
    with pytest.raises(NotImplementedError, match=r'no vmap rule; pass impl="reference"'):
        torch.vmap(lambda t: block(t, heads=2, impl="cpu", **p))(torch.randn(3, 1, 8, 4, 3, 5))
    torch.vmap(lambda t: block(t, heads=2, impl="reference", **p))(torch.randn(3, 1, 8, 4, 3, 5))


@pytest.mark.parametrize(
    ("shape", "dtype", "gradient", "reason"),
    [
        ((1, 64, 16, 32, 32), torch.float32, True, None),
        ((1, 64, 16, 6, 6), torch.float32, True, None),
        ((0, 64, 16, 0, 6), torch.float32, True, None),
        ((1, 64, 16, 3, 3), torch.float32, False, "slower here: 9 positions would fill too few of 16 lanes"),
        ((1, 640, 16, 8, 8), torch.float32, True, "slower here: a backward with 640 channels, more than 512"),
        ((1, 640, 16, 8, 8), torch.float32, False, None),
        ((1, 320, 16, 8, 8), torch.bfloat16, False, "slower here: bfloat16 projections of 320 channels, more than 256"),
    ],
    ids=str,
)
def test_stands_aside_where_it_is_slower(
    shape: tuple[int, ...], dtype: torch.dtype, gradient: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "_AVX512", True)
    kernel = dispatch.ops()["temporal_attention_block"][0]
    assert kernel.slower(dispatch.facts_of(torch.empty(shape, dtype=dtype), gradient)) == reason


def test_projections_are_left_to_torch_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_AVX512", False)
    kernel, reason = dispatch.ops()["temporal_attention_block"][0], "slower here: float32 projections of 256 channels"
    assert kernel.slower(dispatch.facts_of(torch.empty(1, 256, 16, 8, 8), False)).startswith(reason)
    assert kernel.slower(dispatch.facts_of(torch.empty(1, 128, 16, 8, 8), False)) is None
    assert kernel.slower(dispatch.facts_of(torch.empty(1, 256, 16, 8, 8, dtype=torch.bfloat16), False)) is None


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unfused(dtype: torch.dtype, layout: str) -> None:
    x = in_layout(layout, 2, 24, 7, 5, 9).to(dtype).requires_grad_()
    hold(block, x, impl="unfused", dtype=dtype, heads=3, rotary=rotary_tables(7, 4), **parameters(24, 3, 8, 7, dtype))


def test_runs_by_name_where_it_is_slower() -> None:
    x, p = torch.randn(1, 8, 4, 3, 3), parameters(8, 2, 4, 4)
    assert [walk.chosen for walk in dispatch.trace(block, x, heads=2, **p)] == ["unfused", "cpu"]
    with dispatch.use_impl(temporal_attention="reference"):
        assert [walk.chosen for walk in dispatch.trace(block, x, heads=2, **p)] == ["reference"]
    assert [walk.chosen for walk in dispatch.trace(block, x, heads=2, impl="cpu", **p)] == ["cpu"]


def test_float64_runs_the_reference() -> None:
    x, p = torch.randn(1, 8, 4, 3, 5, dtype=torch.float64), parameters(8, 2, 4, 4)
    assert block(x, heads=2, **p).dtype == torch.float64
    with pytest.raises(NotImplementedError, match="cpu: no float64 kernel"):
        block(x, heads=2, impl="cpu", **p)


# ---- bad input -------------------------------------------------------------------------------------------------------

ROTARY = rotary_tables(4, 2)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("x no tensor", {"x": 3}, TypeError, "x: expected a tensor, got 3 (int)"),
    ("x integer", {"x": torch.zeros(1, 8, 4, 3, 5, dtype=torch.int32)}, TypeError, "x: expected dtype float32"),
    ("x 4-D", {"x": torch.zeros(1, 8, 4, 3)}, ValueError, "x: expected 5 dimensions (B, C, T, H, W)"),
    ("q_weight None", {"q_weight": None}, TypeError, "q_weight: expected a tensor, got None (NoneType)"),
    ("q_weight columns", {"q_weight": torch.zeros(8, 7)}, ValueError,
     "q_weight: expected shape (heads*D, C) with C = 8, got (8, 7)"),
    ("k_weight rows", {"k_weight": torch.zeros(6, 8)}, ValueError,
     "k_weight: expected shape (heads*D, C) = (8, 8), got (6, 8)"),
    ("v_weight integer", {"v_weight": torch.zeros(8, 8, dtype=torch.int64)}, TypeError, "v_weight: expected dtype"),
    ("out_weight", {"out_weight": torch.zeros(8, 6)}, ValueError, "out_weight: expected shape (C, heads*D) = (8, 8)"),
    ("out_weight None", {"out_weight": None}, TypeError, "out_weight: expected a tensor, got None"),
    ("heads", {"heads": 3}, ValueError, "heads: expected a positive divisor of q_weight's 8 rows, got 3 (int)"),
    ("heads 0", {"heads": 0}, ValueError, "heads: expected a positive divisor"),
    ("heads float", {"heads": 2.0}, ValueError, "heads: expected a positive divisor"),
    ("v_bias", {"v_bias": torch.zeros(7)}, ValueError, "v_bias: expected shape (heads*D,) = (8,), got (7,)"),
    ("out_bias", {"out_bias": torch.zeros(1)}, ValueError, "out_bias: expected shape (C,) = (8,), got (1,)"),
    ("out_bias device", {"out_bias": torch.zeros(8, device="meta")}, ValueError,
     "out_bias: expected a tensor on cpu as x, got meta"),
    ("norm", {"norm": "batch"}, ValueError, "norm: expected 'layer_norm', 'rms_norm' or None, got 'batch' (str)"),
    ("norm_weight", {"norm_weight": torch.zeros(4)}, ValueError, "norm_weight: expected shape (C,) = (8,), got (4,)"),
    ("norm_weight without norm", {"norm": None, "norm_bias": None}, ValueError,
     "norm_weight: expected None, as norm is None"),
    ("norm_bias with rms", {"norm": "rms_norm"}, ValueError, "norm_bias: expected None, as norm is 'rms_norm'"),
    ("frame_embedding", {"frame_embedding": torch.zeros(5, 8)}, ValueError,
     "frame_embedding: expected shape (T, C) = (4, 8), got (5, 8)"),
    ("attn_bias", {"attn_bias": torch.zeros(4, 4)}, ValueError, "attn_bias: expected shape (heads, T, T) = (2, 4, 4)"),
    ("attn_mask dtype", {"attn_mask": torch.zeros(1, 4)}, TypeError,
     "attn_mask: expected dtype torch.bool (True = attend)"),
    ("attn_mask shape", {"attn_mask": torch.zeros(4, 4, dtype=torch.bool)}, ValueError,
     "attn_mask: expected shape (B, T) or (B, T, T) = (1, 4) or (1, 4, 4), got (4, 4)"),
    ("rotary no pair", {"rotary": ROTARY[0]}, TypeError, "rotary: expected a pair (cos, sin)"),
    ("rotary dtype", {"rotary": (ROTARY[0].half(), ROTARY[1])}, TypeError, "rotary cos: expected dtype float32"),
    ("rotary rows", {"rotary": (ROTARY[0][:3], ROTARY[1][:3])}, ValueError,
     "rotary cos: expected shape (L, R/2) with L >= T = 4 and R <= D = 4, got (3, 2)"),
    ("rotary sin", {"rotary": (ROTARY[0], ROTARY[1][:, :1])}, ValueError, "rotary sin: expected shape of cos = (4, 2)"),
    ("rotary_style", {"rotary_style": "neox"}, ValueError, "rotary_style: expected 'interleaved' or 'half'"),
    ("scale text", {"scale": "1"}, TypeError, "scale: expected a float or None, got '1' (str)"),
    ("scale negative", {"scale": -1.0}, ValueError, "scale: expected a finite float from 0 upward, got -1.0 (float)"),
    ("impl", {"impl": "fast"}, ValueError, "impl: expected one of 'cpu', 'triton', 'unfused', 'reference', got 'fast'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"x": torch.randn(1, 8, 4, 3, 5), "heads": 2, **parameters(8, 2, 4, 4), **change}
    with pytest.raises(error) as caught:
        block(options.pop("x"), **options)
    assert str(caught.value).startswith(f"temporal_attention_block: {message}")
