"""group_norm_silu's Triton and CUDA kernels on a GPU: full size, repeats, graphs, large tensors, no synchronisation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastvdiff import native
from fastvdiff.ops import group_norm_silu, registration
from tests.closeness import hold

pytestmark = pytest.mark.gpu

# (B, C, T, H, W), groups
STANDARD = {
    "svd-l0": ((2, 320, 25, 72, 128), 32),
    "svd-l3": ((2, 1280, 25, 9, 16), 32),
    "animatediff-l1": ((2, 640, 16, 32, 32), 32),
    "vdm-l0": ((4, 64, 16, 64, 64), 8),
    "vae": ((1, 128, 20, 256, 256), 32),
    "mid": ((1, 512, 8, 45, 80), 32),
}
IMPLS = ("triton", "cuda")
FORMATS = pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last_3d], ids=str)


# channels_last samples that fit in the shared memory of clusters
RESIDENT = {
    "mid": ((1, 512, 8, 45, 80), 32),
    "svd-l2": ((2, 1280, 25, 18, 32), 32),
    "svd-l3": ((2, 1280, 25, 9, 16), 32),
    "small": ((2, 64, 4, 8, 8), 32),
}


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation that this build has."""
    if request.param == "cuda" and not native.runs_on(torch.cuda.get_device_capability()):
        pytest.skip("this build has no CUDA kernels for this device")
    return request.param


def drawn(
    shape: tuple[int, ...], format: torch.memory_format, modulated: bool = True, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """x, weight, bias and, `modulated`, scale and shift; all ask for gradients."""
    channels = shape[1]
    leaves = {
        "x": (torch.randn(shape, device="cuda", dtype=dtype) * 2 + 1).contiguous(memory_format=format),
        "weight": torch.randn(channels, device="cuda", dtype=dtype),
        "bias": torch.randn(channels, device="cuda", dtype=dtype),
    }
    if modulated:
        leaves |= {name: torch.randn(shape[:2], device="cuda", dtype=dtype) for name in ("scale", "shift")}
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def run(impl: str, leaves: dict[str, Any], groups: int, grad: torch.Tensor) -> list[torch.Tensor]:
    """The result and every gradient, without a graph: a leaf's place in it keeps the stream on which it was made."""
    y = group_norm_silu(num_groups=groups, impl=impl, **leaves)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad)]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Within the block, a call that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@FORMATS
@pytest.mark.parametrize("case", STANDARD)
def test_full_size(impl: str, case: str, format: torch.memory_format) -> None:
    shape, groups = STANDARD[case]
    leaves = drawn(shape, format)
    x = leaves.pop("x")
    y = hold(group_norm_silu, x, groups, impl=impl, dtype=x.dtype, seed=2**17, **leaves)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(50, 320, 72, 128), (32, 1280, 16, 16), (32, 1280, 8, 8)], ids=str)
def test_frames_folded_into_the_batch(impl: str, shape: tuple[int, ...], format: torch.memory_format) -> None:
    leaves = drawn(shape, format)
    hold(group_norm_silu, leaves.pop("x"), 32, impl=impl, dtype=torch.bfloat16, seed=2**17, **leaves)


@FORMATS
@pytest.mark.parametrize("shape", [(2, 64, 4, 8, 8), (2, 320, 8, 36, 64)], ids=str)
def test_same_bits_250_times(impl: str, shape: tuple[int, ...], format: torch.memory_format) -> None:
    leaves = drawn(shape, format)
    grad = torch.randn_like(leaves["x"])
    first = run(impl, leaves, 32, grad)
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(run(impl, leaves, 32, grad), first, strict=True))


@FORMATS
@pytest.mark.parametrize("shape", [(2, 64, 4, 8, 8), (2, 320, 8, 36, 64)], ids=str)
def test_graph_capture(impl: str, shape: tuple[int, ...], format: torch.memory_format) -> None:
    """A replay on new values gives the bits of an eager call on them."""
    leaves = drawn(shape, format)
    grad = torch.randn_like(leaves["x"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(impl, leaves, 32, grad)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(impl, leaves, 32, grad)
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(impl, leaves, 32, grad), strict=True))


@FORMATS
@pytest.mark.parametrize("shape", [(2, 64, 4, 8, 8), (2, 320, 8, 36, 64)], ids=str)
def test_never_synchronises(impl: str, shape: tuple[int, ...], format: torch.memory_format) -> None:
    leaves = drawn(shape, format)
    grad = torch.randn_like(leaves["x"])
    run(impl, leaves, 32, grad)  # compiles
    with no_synchronisation():
        run(impl, leaves, 32, grad)


@FORMATS
def test_large_offsets(impl: str, format: torch.memory_format) -> None:
    """The last group of the second sample, where a 32-bit offset has wrapped, against a small call on it alone."""
    shape = (2, 64, 16, 1024, 1040)
    x = torch.empty(shape, device="cuda", dtype=torch.bfloat16, memory_format=format).normal_()
    assert x.numel() > 2**31
    y = group_norm_silu(x, 32, impl=impl)
    part = x[1:, 62:].contiguous().requires_grad_()
    expected = group_norm_silu(part, 1, impl=impl)
    torch.testing.assert_close(y[1:, 62:], expected, rtol=1e-2, atol=1e-2)
    del y
    dx = torch.autograd.grad(group_norm_silu(x.requires_grad_(), 32, impl=impl), x, x.detach())[0]
    torch.testing.assert_close(dx[1:, 62:], torch.autograd.grad(expected, part, part.detach())[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("space", [(16,), (8, 9)], ids=str)
def test_more_samples_than_a_grid_axis(impl: str, space: tuple[int, ...]) -> None:
    x = torch.randn(70_000, 4, *space, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    hold(group_norm_silu, x, 2, impl=impl, dtype=x.dtype, seed=2**17)


@FORMATS
def test_activation_at_the_ends(impl: str, format: torch.memory_format) -> None:
    """The quotient in two instructions, where exp overflows."""
    ends = [math.inf, -math.inf, math.nan, 1e30, -1e30, 88.5, -88.5, -200.0, 200.0, 0.0, -1e-30]
    ends = torch.tensor([ends], device="cuda")
    x = torch.randn(1, ends.shape[1], 2, 3, 3, device="cuda").contiguous(memory_format=format)
    zero = torch.zeros(ends.shape[1], device="cuda")
    y = group_norm_silu(x, 1, zero, zero, shift=ends, impl=impl)
    expected = torch.nn.functional.silu(ends)[:, :, None, None, None].expand_as(x)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-6, atol=1e-35)


@pytest.fixture
def _clusters() -> None:
    reason = registration._no_clusters_on_this()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("_clusters")
@pytest.mark.parametrize("case", RESIDENT)
def test_clusters(case: str) -> None:
    """Full size against float64, and the same bits again without a wait."""
    shape, groups = RESIDENT[case]
    leaves = drawn(shape, torch.channels_last_3d)
    grad = torch.randn_like(leaves["x"])
    first = run("cuda_sm90", leaves, groups, grad)
    with no_synchronisation():
        again = [run("cuda_sm90", leaves, groups, grad) for _ in range(3)]
    assert all(torch.equal(a, b) for run_again in again for a, b in zip(run_again, first, strict=True))
    x = leaves.pop("x")
    hold(group_norm_silu, x, groups, impl="cuda_sm90", dtype=x.dtype, seed=2**17, **leaves)


@pytest.mark.usefixtures("_clusters")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frames", [True, False], ids=("(B, C, T)", "(B, C)"))
def test_clusters_of_every_dtype(frames: bool, dtype: torch.dtype) -> None:
    """Small enough for the tools that watch every access; groups that end within a thread's channels."""
    leaves = drawn((2, 40, 3, 5, 7), torch.channels_last_3d, modulated=False, dtype=dtype)
    modulation = (2, 40, 3) if frames else (2, 40)
    leaves |= {
        name: torch.randn(modulation, device="cuda", dtype=dtype).requires_grad_() for name in ("scale", "shift")
    }
    hold(group_norm_silu, leaves.pop("x"), 4, impl="cuda_sm90", dtype=dtype, seed=2**17, **leaves)


@pytest.mark.usefixtures("_clusters")
@pytest.mark.parametrize("case", RESIDENT)
def test_graph_capture_of_clusters(case: str) -> None:
    shape, groups = RESIDENT[case]
    leaves = drawn(shape, torch.channels_last_3d)
    grad = torch.randn_like(leaves["x"])
    first = run("cuda_sm90", leaves, groups, grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run("cuda_sm90", leaves, groups, grad)
    for _ in range(100):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))


@pytest.mark.usefixtures("_clusters")
def test_large_offsets_of_clusters() -> None:
    """The last of so many samples that a 32-bit offset has wrapped, against a call on it alone; 19 GB."""
    x = torch.empty((152, 512, 8, 45, 80), device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last_3d)
    x.normal_().requires_grad_()
    assert x[:-1].numel() > 2**31
    part = x.detach()[-1:].clone(memory_format=torch.preserve_format).requires_grad_()
    grad = torch.randn_like(x)
    far, near = (group_norm_silu(t, 32, impl="cuda_sm90") for t in (x, part))
    torch.testing.assert_close(far[-1:], near, rtol=1e-2, atol=1e-2)
    (dx,), (expected,) = torch.autograd.grad(far, x, grad), torch.autograd.grad(near, part, grad[-1:])
    torch.testing.assert_close(dx[-1:], expected, rtol=1e-2, atol=1e-2)
