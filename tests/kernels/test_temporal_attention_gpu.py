"""temporal_attention's Triton kernels on a GPU: full size, repeats, graphs, large tensors, no synchronisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvdiff.ops import temporal_attention
from tests.closeness import hold
from tests.ops.temporal_attention_inputs import (
    LAYOUTS,
    NARROW,
    Shape,
    drawn,
    fused_frames_first,
    results,
    rotary_tables,
)

pytestmark = pytest.mark.gpu

# (B, T, S, heads, D) of the standard shapes whose float64 oracle fits.
STANDARD = {
    "svd-l0": (1, 25, 72 * 128, 5, 64),
    "svd-l3": (2, 25, 9 * 16, 20, 64),
    "animatediff-l0": (2, 16, 64 * 64, 8, 40),
    "animatediff-l1": (2, 16, 32 * 32, 8, 80),
    "animatediff-l2": (2, 16, 16 * 16, 8, 160),
    "vdm-l0": (2, 16, 64 * 64, 8, 32),
    "64-frames": (1, 64, 32 * 32, 8, 64),
    "256-frames": (1, 256, 16 * 16, 5, 80),
}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", STANDARD.values(), ids=STANDARD.keys())
def test_standard_shapes(shape: Shape, layout: Any, dtype: torch.dtype) -> None:
    q, k, v = (drawn(shape, "cuda", dtype, layout) for _ in range(3))
    hold(temporal_attention, q, k, v, impl="triton", dtype=dtype)
    bias = torch.randn(shape[3], shape[1], shape[1], device="cuda", requires_grad=True)
    options = {"attn_bias": bias, "rotary": rotary_tables(shape[1], shape[4] // 2, "cuda")}
    hold(temporal_attention, q, k, v, impl="triton", dtype=dtype, **options)


@pytest.mark.parametrize("frames", [1, 9, 80])
def test_same_bits_250_times(frames: int) -> None:
    q, k, v = (drawn((2, frames, 11, 3, 16), "cuda", torch.bfloat16) for _ in range(3))
    bias = torch.randn(3, frames, frames, device="cuda", requires_grad=True)
    grad = torch.randn(q.shape, device="cuda").bfloat16()
    rotary = rotary_tables(frames, 8, "cuda")
    first = results((q, k, v, bias), grad, rotary=rotary)
    for _ in range(249):
        again = results((q, k, v, bias), grad, rotary=rotary)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("frames", [16, 100])
def test_replays_from_a_graph_without_waiting(frames: int) -> None:
    """Capture and sync debug mode refuse every call that waits for the device."""
    q, k, v = (drawn((2, frames, 64, 8, 40), "cuda", torch.bfloat16, fused_frames_first) for _ in range(3))
    bias = torch.randn(8, frames, frames, device="cuda", requires_grad=True)
    grad = torch.randn(q.shape, device="cuda").bfloat16()
    mask = torch.rand(2, frames, device="cuda") > 0.2
    rotary = rotary_tables(frames, 16, "cuda")

    def step() -> tuple[torch.Tensor, ...]:
        return results((q, k, v, bias), grad, attn_mask=mask, rotary=rotary, is_causal=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("frames", [2, 66])
def test_large_offsets(frames: int) -> None:
    positions = 2**31 // (frames * 8 * 64) + 257
    shape = (1, frames, positions, 8, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    grad = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    found = results((q, k, v), grad)
    for part in (slice(0, 3), slice(positions // 2, positions // 2 + 3), slice(positions - 3, positions)):
        leaves = tuple(t.detach()[:, :, part].requires_grad_() for t in (q, k, v))
        for a, b in zip(found, results(leaves, grad[:, :, part]), strict=True):
            assert torch.equal(a[:, :, part], b)


@pytest.mark.parametrize("heads", [1, 3])
def test_more_sequences_than_a_grid_dimension_holds(heads: int) -> None:
    q, k, v = (drawn((2, 16, 70_001, heads, 8), "cuda", torch.float16) for _ in range(3))
    hold(temporal_attention, q, k, v, impl="triton", dtype=torch.float16)
