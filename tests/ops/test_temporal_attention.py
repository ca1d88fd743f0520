"""temporal_attention: every feature against float64, gradients, layouts, instruction sets, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from fastvdiff import dispatch, native
from fastvdiff.ops import temporal_attention
from tests.closeness import assert_close, hold
from tests.ops.drawn_temporal_attention import calls
from tests.ops.temporal_attention_inputs import LAYOUTS, NARROW, Shape, channels_first, frames_first, rotary_tables


@settings(max_examples=360)
@given(calls(), st.sampled_from(native.available_isas()))
def test_holds_to_float64(call: tuple[tuple[torch.Tensor, ...], dict[str, Any], torch.dtype], isa: str) -> None:
    args, options, dtype = call
    with native.use_isa(isa):
        y = hold(temporal_attention, *args, impl="cpu", dtype=dtype, **options)
    assert y.dtype == dtype
    assert y.stride() == torch.empty_like(args[0]).stride()


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:-1], ids=lambda f: f.__name__)
@pytest.mark.parametrize("frames", [16, 25])
def test_every_instruction_set_over_many_strips(isa: str, dtype: torch.dtype, layout: Any, frames: int) -> None:
    def big() -> torch.Tensor:
        return layout((2, frames, 153, 3, 32), lambda shape: torch.randn(shape).to(dtype)).requires_grad_()

    with native.use_isa(isa):
        hold(
            temporal_attention, big(), big(), big(), impl="cpu", dtype=dtype,
            attn_bias=torch.randn(3, frames, frames, requires_grad=True), rotary=rotary_tables(frames, 16),
        )  # fmt: skip


@pytest.mark.parametrize("isa", native.available_isas())
def test_results_that_go_past_the_caches(isa: str) -> None:
    """More than 24 MB in all tensors of a call, forward and backward."""
    q, k, v = (frames_first((1, 16, 801, 4, 32), torch.randn).requires_grad_() for _ in range(3))
    with native.use_isa(isa):
        hold(temporal_attention, q, k, v, impl="cpu", dtype=torch.float32)


@pytest.mark.parametrize(("frames", "dim"), [(128, 8), (256, 4), (70, 160)])
def test_many_frames(frames: int, dim: int) -> None:
    q, k, v = (torch.randn(1, frames, 5, 1, dim, requires_grad=True) for _ in range(3))
    hold(temporal_attention, q, k, v, impl="cpu", dtype=torch.float32)


def test_means_what_scaled_dot_product_attention_means() -> None:
    q, k, v = (channels_first((2, 9, 12, 2, 16), torch.randn) for _ in range(3))
    bias = torch.randn(2, 9, 9)
    batched = (x.permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*batched, attn_mask=bias)
    expected = expected.unflatten(0, (2, 12)).permute(0, 3, 1, 2, 4)
    for impl in ("cpu", "reference"):
        torch.testing.assert_close(temporal_attention(q, k, v, attn_bias=bias, impl=impl), expected)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_query_with_no_key_gives_zero_and_no_gradient(impl: str, bias: bool) -> None:
    q, k, v = (torch.randn(2, 4, 5, 2, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, 2] = mask[1] = False
    options = {"attn_bias": torch.randn(2, 4, 4)} if bias else {}
    y = temporal_attention(q, k, v, attn_mask=mask, impl=impl, **options)
    assert not y[0, 2].any()
    assert not y[1].any()
    assert y[0, 0].all()
    dq, dk, dv = torch.autograd.grad(y.sum(), (q, k, v))
    assert not dq[0, 2].any()
    assert not any(g[1].any() for g in (dq, dk, dv))
    assert all(torch.isfinite(g).all() for g in (dq, dk, dv))


def test_rotary_keeps_scores_relative() -> None:
    """Turning queries and keys by the same number of rows more leaves the result as it is."""
    q, k, v = (torch.randn(1, 6, 7, 2, 16) for _ in range(3))
    cos, sin = rotary_tables(20, 8)
    for style in ("interleaved", "half"):
        y = temporal_attention(q, k, v, rotary=(cos, sin), rotary_style=style, k_offset=2, impl="cpu")
        later = temporal_attention(
            q, k, v, rotary=(cos[9:].contiguous(), sin[9:].contiguous()), rotary_style=style, k_offset=2, impl="cpu"
        )
        torch.testing.assert_close(y, later, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("shape", [(0, 4, 5, 2, 8), (2, 0, 5, 2, 8), (2, 4, 0, 2, 8), (2, 4, 5, 0, 8)], ids=str)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_empty(shape: Shape, impl: str) -> None:
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    bias = torch.randn(shape[3], shape[1], shape[1], requires_grad=True)
    y = temporal_attention(q, k, v, attn_bias=bias, impl=impl)
    assert y.shape == shape
    grads = torch.autograd.grad(y.sum(), (q, k, v, bias), allow_unused=True)
    assert not any(g is not None and g.any() for g in grads)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_no_keys_at_all_give_zero(impl: str) -> None:
    q = torch.randn(2, 4, 5, 2, 8, requires_grad=True)
    k = v = torch.randn(2, 0, 5, 2, 8)
    y = temporal_attention(q, k, v, impl=impl)
    assert y.shape == q.shape
    assert not y.any()
    assert not torch.autograd.grad(y.sum(), q)[0].any()


@pytest.mark.parametrize("isa", native.available_isas())
def test_large_scores(isa: str) -> None:
    """Scores of some thousands: the softmax is a choice of one key, and nothing overflows."""
    q, k, v = (torch.randn(1, 8, 19, 2, 16, requires_grad=True) for _ in range(3))
    with native.use_isa(isa):
        y = temporal_attention(q * 60, k * 60, v, impl="cpu")
    exact = temporal_attention(q.double() * 60, k.double() * 60, v.double(), impl="reference")
    eager = temporal_attention(q * 60, k * 60, v, impl="reference")
    assert_close(y, exact, eager)
    for far in (1e30, -1e30):
        with native.use_isa(isa):
            y = temporal_attention(q, k, v, attn_bias=torch.full((2, 8, 8), far), impl="cpu")
        torch.testing.assert_close(y, v.mean(1, keepdim=True).expand_as(y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_and_inf_are_carried(isa: str, value: float, which: int) -> None:
    """What is not finite shows at its own position and head, and nowhere else."""
    inputs = [torch.randn(1, 6, 21, 2, 8) for _ in range(3)]
    inputs[which][0, 3, 17, 1, 2] = value
    with native.use_isa(isa):
        y = temporal_attention(*inputs, impl="cpu")
    bad = ~torch.isfinite(y)
    # torch's fused CPU kernel gives zeros for a query of NaN, its plain one does not.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = ~torch.isfinite(temporal_attention(*inputs, impl="reference"))
    assert torch.equal(bad, expected)
    assert int(bad.sum()) == int(bad[0, :, 17, 1].sum()) > 0


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=lambda f: f.__name__)
def test_same_result_with_any_number_of_threads(dtype: torch.dtype, layout: Any) -> None:
    def big() -> torch.Tensor:
        return layout((3, 9, 70, 3, 16), lambda shape: torch.randn(shape).to(dtype)).requires_grad_()

    q, k, v = big(), big(), big()
    bias = torch.randn(3, 9, 9, requires_grad=True)
    grad = torch.randn(q.shape).to(dtype)
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        y = temporal_attention(q, k, v, attn_bias=bias, impl="cpu")
        results.append((y, *torch.autograd.grad(y, (q, k, v, bias), grad)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_only_where_wanted() -> None:
    q, k, v = (torch.randn(1, 4, 5, 2, 8) for _ in range(3))
    bias = torch.randn(2, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    y = temporal_attention(q, k.requires_grad_(), v, attn_bias=bias, impl="cpu")
    y.sum().backward()
    assert q.grad is None
    assert v.grad is None
    assert k.grad.shape == k.shape
    assert bias.grad.dtype == torch.bfloat16


def test_more_sequences_than_a_grid_dimension_holds() -> None:
    q, k, v = (torch.randn(1, 2, 70_000, 1, 4) for _ in range(3))
    torch.testing.assert_close(
        temporal_attention(q, k, v, impl="cpu"), temporal_attention(q, k, v, impl="reference"), atol=1e-6, rtol=1e-5
    )


# ---- torch's machinery -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.no_poison
@pytest.mark.parametrize("layout", LAYOUTS[:5], ids=lambda f: f.__name__)
def test_opcheck(layout: Any, impl: str) -> None:
    q, k, v = (layout((2, 4, 5, 2, 8), torch.randn).requires_grad_() for _ in range(3))
    cos, sin = rotary_tables(6, 3)
    bias = torch.randn(2, 4, 4, requires_grad=True)
    mask = torch.ones(2, 4, 4, dtype=torch.bool).tril()
    op = torch.ops.fastvdiff.temporal_attention.default
    torch.library.opcheck(op, (q, k, v, None, None, None, None, True, 0, 0.35, False, impl))
    torch.library.opcheck(op, (q, k, v, bias, mask, cos, sin, False, 2, 0.35, True, impl))
    backward = torch.ops.fastvdiff.temporal_attention_backward.default
    grad = torch.randn(q.shape)
    inputs = (grad, *(t.detach() for t in (q, k, v, bias)), mask, cos, sin, False, 2, 0.35, True, True, impl)
    torch.library.opcheck(backward, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.no_poison
def test_compiles_whole_and_seldom_again() -> None:
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return temporal_attention(q, k, v, is_causal=True, impl="cpu") * 2

    for positions in (4, 6, 9, 30, 35):
        q, k, v = (torch.randn(1, 5, positions, 2, 8, requires_grad=True) for _ in range(3))
        torch.testing.assert_close(call(q, k, v), temporal_attention(q, k, v, is_causal=True) * 2)
    assert counter.frame_count <= 2


@pytest.mark.no_poison
def test_compiled_gradients() -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return temporal_attention(q, k, v, attn_bias=bias).sin()

    leaves = [channels_first((1, 5, 6, 2, 8), torch.randn).requires_grad_() for _ in range(3)]
    leaves.append(torch.randn(2, 5, 5, requires_grad=True))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    for a, b in zip(found, torch.autograd.grad(call(*leaves).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_autocast(impl: str) -> None:
    q, k, v = (torch.randn(1, 5, 17, 2, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = temporal_attention(q, k.to(torch.bfloat16), v, attn_bias=bias, rotary=rotary_tables(5, 4), impl=impl)
    assert y.dtype == torch.bfloat16
    narrow = [t.to(torch.bfloat16) for t in (q, k, v)]
    torch.testing.assert_close(y, temporal_attention(*narrow, attn_bias=bias, rotary=rotary_tables(5, 4), impl=impl))
    y.sum().backward()
    assert q.grad.dtype == bias.grad.dtype == torch.float32


def test_second_derivatives_and_vmap_name_the_reference() -> None:
    q, k, v = (torch.randn(1, 4, 5, 2, 8, requires_grad=True) for _ in range(3))
    first = torch.autograd.grad(temporal_attention(q, k, v, impl="cpu").sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=r'temporal_attention: .* second derivative; .*impl="reference"'):
        torch.autograd.grad(first.sum(), q)
    with pytest.raises(NotImplementedError, match=r'temporal_attention: .* vmap rule; .*impl="reference"'):
        torch.vmap(lambda x: temporal_attention(x, x, x, impl="cpu"))(torch.randn(3, 1, 4, 5, 2, 8))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        first = torch.autograd.grad(temporal_attention(q, k, v, impl="reference").sum(), q, create_graph=True)[0]
        assert torch.autograd.grad(first.square().sum(), k)[0].any()


@pytest.mark.parametrize(
    ("layout", "shape", "dtype", "reason"),
    [
        (frames_first, (1, 16, 1024, 4, 32), torch.float32, None),
        (frames_first, (1, 16, 12, 4, 32), torch.float32, None),
        (frames_first, (1, 16, 9, 4, 32), torch.float32, None),
        (frames_first, (1, 16, 3, 4, 32), torch.float32, None),
        (channels_first, (1, 16, 9, 4, 32), torch.float32, None),
        (channels_first, (1, 16, 6, 4, 32), torch.float32, "slower here: 6 positions would fill too few of 16 lanes"),
        (frames_first, (0, 16, 0, 4, 32), torch.float32, None),
        (frames_first, (1, 256, 32, 1, 64), torch.float32, None),
        (frames_first, (1, 256, 32, 1, 80), torch.float32, None),
        (frames_first, (1, 256, 32, 1, 80), torch.float16, None),
        (channels_first, (1, 256, 32, 1, 80), torch.float32, None),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_stands_aside_where_it_is_slower(layout: Any, shape: Shape, dtype: torch.dtype, reason: str | None) -> None:
    q = layout(shape, lambda sizes: torch.empty(sizes, dtype=dtype))
    (walk,) = dispatch.trace(temporal_attention, q, q, q)
    assert walk.chosen == ("cpu" if reason is None else "reference")
    assert reason is None or walk.reasons["cpu"].startswith(reason)
    dispatch.trace(temporal_attention, q, q, q, impl="cpu")  # by name it runs all the same


def test_float64_runs_the_reference() -> None:
    q = torch.randn(1, 4, 5, 2, 8, dtype=torch.float64)
    assert temporal_attention(q, q, q).dtype == torch.float64
    with pytest.raises(NotImplementedError, match="cpu: no float64 kernel"):
        temporal_attention(q, q, q, impl="cpu")


# ---- bad input -------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 4, 5, 3, 8)
TABLE = torch.zeros(4, 4)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("q is a list", {"q": [1.0]}, TypeError, r"q: expected a tensor, got \[1.0\]"),
    ("q has 4 dimensions", {"q": X[0]}, ValueError, r"q: expected 5 dimensions \(B, T, S, heads, D\), got shape"),
    ("q holds integers", {"q": X.int()}, TypeError, "q: expected dtype float32, .* got torch.int32"),
    ("no dims", {"q": X[..., :0]}, ValueError, "q: expected a head dimension D of at least 1"),
    ("k of another dtype", {"k": X.half()}, TypeError, "k: expected torch.float32 as q, got torch.float16"),
    ("k on another device", {"k": X.to("meta")}, ValueError, "k: expected a tensor on cpu as q, got meta"),
    ("k of another batch", {"k": X[:1]}, ValueError, r"k: expected shape \(B, Tk, S, heads, D\)"),
    ("v of another length", {"v": X[:, :3]}, ValueError, r"v: expected shape \(B, Tk, S, heads, D\)"),
    ("a bias per batch", {"attn_bias": torch.zeros(2, 3, 4, 4)}, ValueError, r"attn_bias: .*shape \(heads, T, Tk\)"),
    ("an integer bias", {"attn_bias": torch.zeros(3, 4, 4).int()}, TypeError, "attn_bias: expected dtype float32"),
    ("a float mask", {"attn_mask": torch.zeros(2, 4)}, TypeError, "attn_mask: expected dtype torch.bool"),
    ("a mask of another shape", {"attn_mask": torch.zeros(4, 2) > 0}, ValueError, r"attn_mask: .*shape \(B, Tk\) or"),
    ("one rotary table", {"rotary": TABLE}, TypeError, r"rotary: expected a pair \(cos, sin\)"),
    ("half tables", {"rotary": (TABLE.half(), TABLE)}, TypeError, "rotary cos: expected dtype float32"),
    ("too few rows", {"rotary": (TABLE, TABLE), "k_offset": 1}, ValueError, r"rotary cos: .*k_offset \+ Tk\) = 5"),
    ("too wide", {"rotary": (torch.zeros(4, 5),) * 2}, ValueError, r"rotary cos: .*R <= D = 8, got \(4, 5\)"),
    ("two widths", {"rotary": (TABLE, TABLE[:, :3])}, ValueError, "rotary sin: expected shape of cos"),
    ("an unknown style", {"rotary_style": "neox"}, ValueError, "rotary_style: expected .interleaved. or .half."),
    ("a negative offset", {"k_offset": -1}, ValueError, "k_offset: expected an int from 0 upward, got -1"),
    ("a float offset", {"k_offset": 1.0}, ValueError, "k_offset: expected an int from 0 upward, got 1.0"),
    ("a scale in words", {"scale": "big"}, TypeError, "scale: expected a float or None, got 'big'"),
    ("a negative scale", {"scale": -0.5}, ValueError, "scale: expected a finite float from 0 upward, got -0.5"),
    (
        "an unknown implementation",
        {"impl": "fast"},
        ValueError,
        "impl: expected one of 'cpu', 'triton', 'reference', got 'fast'",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"q": X, "k": X, "v": X, **change}
    with pytest.raises(error, match=f"temporal_attention: {message}"):
        temporal_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
