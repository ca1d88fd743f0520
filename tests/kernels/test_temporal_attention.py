"""temporal_attention's Triton kernels: on a GPU, else on the CPU under the interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from fastvdiff.kernels import launch
from fastvdiff.ops import temporal_attention
from tests.closeness import assert_close, hold
from tests.ops.drawn_temporal_attention import calls
from tests.ops.temporal_attention_inputs import Shape, channels_first, drawn, frames_first, results, rotary_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Drawn = tuple[tuple[torch.Tensor, ...], dict[str, Any], torch.dtype]


def check(call: Drawn) -> None:
    args, options, dtype = call
    y = hold(temporal_attention, *args, impl="triton", dtype=dtype, **options)
    assert y.dtype == dtype
    assert y.stride() == torch.empty_like(args[0]).stride()


@settings(max_examples=240)
@given(calls(DEVICE, positions=(1, 3, 9, 17), limit=15_000))
def test_holds_to_float64(call: Drawn) -> None:
    check(call)


@settings(max_examples=60)
@given(calls(DEVICE, frames=(33, 64, 65, 96, 130), keys=(1, 16, 40, 70, 129), positions=(1, 3), limit=10_000))
def test_holds_to_float64_over_many_frames(call: Drawn) -> None:
    check(call)


@pytest.mark.parametrize(
    ("dtype", "layout", "frames"),
    [
        (torch.bfloat16, frames_first, 16),
        (torch.float16, frames_first, 25),
        (torch.float32, channels_first, 9),
        (torch.bfloat16, channels_first, 25),
        (torch.bfloat16, frames_first, 64),
        (torch.float32, frames_first, 40),
        (torch.float16, channels_first, 40),
        (torch.bfloat16, frames_first, 100),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_every_candidate_configuration(dtype: torch.dtype, layout: Any, frames: int, device: str) -> None:
    """Under the interpreter, where warps do not exist, another tile of each kernel."""
    q, k, v = (drawn((1, frames, 3, 1, 24), device, dtype, layout) for _ in range(3))
    options: dict[str, Any] = {"attn_bias": torch.randn(1, frames, frames, device=device, requires_grad=True)}
    with launch.recorded() as launches:
        temporal_attention(q, k, v, impl="triton", **options).sum().backward()
    for used in launches:
        assert used.used in used.candidates
        tiles = {str({**c, "num_warps": 0, "num_stages": 0}): c for c in used.candidates if c != used.used}
        for candidate in used.candidates if device == "cuda" else list(tiles.values())[-1:]:
            with launch.trying(used.kernel, used.shape_class, candidate):
                hold(temporal_attention, q, k, v, impl="triton", dtype=dtype, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frames", [4, 70])
def test_a_query_with_no_key_gives_zero_and_no_gradient(frames: int, bias: bool, device: str) -> None:
    q, k, v = (drawn((2, frames, 3, 2, 8), device, torch.float32) for _ in range(3))
    mask = torch.ones(2, frames, frames, dtype=torch.bool, device=device)
    mask[0, 2] = mask[1] = False
    options = {"attn_bias": torch.randn(2, frames, frames, device=device)} if bias else {}
    y = temporal_attention(q, k, v, attn_mask=mask, impl="triton", **options)
    assert not y[0, 2].any()
    assert not y[1].any()
    assert y[0, 0].all()
    dq, dk, dv = torch.autograd.grad(y.sum(), (q, k, v))
    assert not dq[0, 2].any()
    assert not any(g[1].any() for g in (dq, dk, dv))
    assert all(torch.isfinite(g).all() for g in (dq, dk, dv))


@pytest.mark.parametrize("shape", [(0, 4, 5, 2, 8), (2, 0, 5, 2, 8), (2, 4, 0, 2, 8), (2, 4, 5, 0, 8)], ids=str)
def test_empty(shape: Shape, device: str) -> None:
    q, k, v = (drawn(shape, device, torch.float32) for _ in range(3))
    bias = torch.randn(shape[3], shape[1], shape[1], device=device, requires_grad=True)
    y = temporal_attention(q, k, v, attn_bias=bias, impl="triton")
    assert y.shape == shape
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), (q, k, v, bias)))


def test_no_keys_at_all_give_zero(device: str) -> None:
    q = torch.randn(2, 4, 5, 2, 8, requires_grad=True, device=device)
    k = v = torch.randn(2, 0, 5, 2, 8, device=device)
    y = temporal_attention(q, k, v, impl="triton")
    assert y.shape == q.shape
    assert not y.any()
    assert not torch.autograd.grad(y.sum(), q)[0].any()


@pytest.mark.parametrize("frames", [8, 72])
def test_large_scores(frames: int, device: str) -> None:
    """Scores of thousands: the softmax is a choice of one key, and nothing overflows.

    Of small integers, so that no order of summation rounds them: a near tie would show the scores' last bit.
    """
    q, k, v = (torch.randn(1, frames, 5, 2, 16, device=device).mul(3).round() for _ in range(3))
    y = temporal_attention(q * 60, k * 60, v, impl="triton")
    exact = temporal_attention(q.double() * 60, k.double() * 60, v.double(), impl="reference")
    assert_close(y, exact, temporal_attention(q * 60, k * 60, v, impl="reference"))
    for far in (1e30, -1e30, torch.finfo(torch.float32).min):
        y = temporal_attention(q, k, v, attn_bias=torch.full((2, frames, frames), far, device=device), impl="triton")
        torch.testing.assert_close(y, v.mean(1, keepdim=True).expand_as(y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["q", "k", "v", "grad"])
@pytest.mark.parametrize("frames", [6, 66])
def test_nan_and_inf_are_carried(frames: int, which: int, value: float, device: str) -> None:
    """What is not finite shows at its own position and head, in result and gradients, and nowhere else."""
    inputs = [torch.randn(1, frames, 5, 2, 8, device=device) for _ in range(4)]
    inputs[which][0, 3, 3, 1, 2] = value
    leaves, grad = [t.requires_grad_() for t in inputs[:3]], inputs[3]
    y = temporal_attention(*leaves, impl="triton")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = temporal_attention(*leaves, impl="reference")
    assert torch.equal(torch.isfinite(y), torch.isfinite(expected))
    for result in (y, *torch.autograd.grad(y, leaves, grad)):
        bad = ~torch.isfinite(result)
        assert int(bad.sum()) == int(bad[0, :, 3, 1].sum())


@pytest.mark.parametrize("frames", [1, 9, 80])
def test_same_input_same_output(frames: int, device: str) -> None:
    # A CPU's order is one whatever the shape: there the interpreter takes few sequences.
    shape = (2, frames, 11, 3, 16) if device == "cuda" or frames < 33 else (1, frames, 3, 2, 16)
    q, k, v = (drawn(shape, device, torch.bfloat16) for _ in range(3))
    bias = torch.randn(shape[3], frames, frames, device=device, requires_grad=True)
    grad = torch.randn(q.shape, device=device).bfloat16()
    first, second = (results((q, k, v, bias), grad, rotary=rotary_tables(frames, 8, device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("frames", [9, 80])
def test_bias_gradient_over_many_groups(frames: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that take several groups of sequences, the last of them none."""
    monkeypatch.setattr(launch, "multiprocessors", lambda x: 1)
    q, k, v = (drawn((2, frames, 27, 2, 8), device, torch.float32) for _ in range(3))
    bias = torch.randn(2, frames, frames, device=device).bfloat16().requires_grad_()
    hold(temporal_attention, q, k, v, attn_bias=bias, impl="triton", dtype=torch.float32)


def test_gradients_only_where_wanted(device: str) -> None:
    q, k, v = (torch.randn(1, 4, 5, 2, 8, device=device) for _ in range(3))
    bias = torch.randn(2, 4, 4, dtype=torch.bfloat16, device=device, requires_grad=True)
    temporal_attention(q, k.requires_grad_(), v, attn_bias=bias, impl="triton").sum().backward()
    assert q.grad is None
    assert v.grad is None
    assert k.grad.shape == k.shape
    assert bias.grad.dtype == torch.bfloat16


def test_refusals(device: str) -> None:
    def call(frames: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        q = torch.zeros(1, frames, 1, 1, dim, device=device, dtype=dtype)
        temporal_attention(q, q, q, impl="triton")

    with pytest.raises(NotImplementedError, match="triton: up to 256 frames, not 257"):
        call(257, 8)
    with pytest.raises(NotImplementedError, match="triton: a head dimension D of up to 160, not 161"):
        call(4, 161)
    with pytest.raises(NotImplementedError, match="triton: no float64 kernel"):
        call(4, 8, torch.float64)
