"""conv3d's CUDA kernels on a GPU: full size, repeats, graphs, memory, large tensors, no synchronisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvdiff import native
from fastvdiff.ops import conv3d, norm_silu_conv3d, registration
from fastvdiff.reference.conv3d import moments
from tests.closeness import hold

pytestmark = pytest.mark.gpu

LAST = torch.channels_last_3d
# (B, C, T, H, W), C_out, kernel
STANDARD = {
    "svd-l0 1x3x3": ((2, 320, 25, 72, 128), 320, (1, 3, 3)),
    "svd-l0 3x1x1": ((2, 320, 25, 72, 128), 320, (3, 1, 1)),
    "svd-l3 3x1x1": ((2, 1280, 25, 9, 16), 1280, (3, 1, 1)),
    "animatediff-l1 1x3x3": ((2, 640, 16, 32, 32), 640, (1, 3, 3)),
    "vdm-l0 in 1x7x7": ((4, 3, 16, 64, 64), 64, (1, 7, 7)),
    "vae out 3x3x3": ((1, 128, 8, 64, 64), 3, (3, 3, 3)),
}
SMALL = {
    "vectors": ((2, 40, 3, 9, 11), 72, (3, 3, 3)),
    "elements": ((2, 3, 3, 9, 11), 5, (3, 3, 3)),
}


@pytest.fixture(autouse=True)
def _built_for_this_device() -> None:
    if not native.runs_on(torch.cuda.get_device_capability()):
        pytest.skip("this build has no CUDA kernels for this device")


def drawn(
    shape: tuple[int, ...], outputs: int, kernel: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """x, weight and every epilogue of a convolution to the same size; all ask for gradients."""
    batch, channels, *size = shape

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device="cuda", dtype=dtype)

    fan_in = channels * kernel[0] * kernel[1] * kernel[2]
    leaves = {
        "x": draw(*shape).contiguous(memory_format=LAST),
        "weight": (draw(outputs, channels, *kernel) / fan_in**0.5).contiguous(memory_format=LAST),
        "bias": draw(outputs), "channel_bias": draw(batch, outputs, size[0]),
        "residual": draw(batch, outputs, *size).contiguous(memory_format=LAST),
    }  # fmt: skip
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def run(leaves: dict[str, Any], grad: torch.Tensor) -> list[torch.Tensor]:
    """The result, its statistics and every gradient."""
    y, stats = conv3d(**leaves, padding="same", stats_groups=1, impl="cuda")
    return [y, stats, *torch.autograd.grad(y, list(leaves.values()), grad)]


def clips(case: str) -> tuple[dict[str, Any], torch.Tensor]:
    """A small case's leaves, and a gradient of its result."""
    leaves = drawn(*SMALL[case])
    return leaves, torch.randn_like(leaves["residual"])


@pytest.mark.parametrize("case", STANDARD)
def test_full_size(case: str) -> None:
    leaves = drawn(*STANDARD[case])
    x, weight = leaves.pop("x"), leaves.pop("weight")
    hold(conv3d, x, weight, padding="same", impl="cuda", dtype=x.dtype, seed=2**17, **leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL)
def test_small(case: str, dtype: torch.dtype) -> None:
    leaves = drawn(*SMALL[case], dtype=dtype)
    x, weight = leaves.pop("x"), leaves.pop("weight")
    y, stats = hold(conv3d, x, weight, padding="same", stats_groups=1, impl="cuda", dtype=dtype, **leaves)
    torch.testing.assert_close(stats, moments(y, 1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", SMALL)
def test_float32_as_tf32(case: str) -> None:
    """Within what rounding both factors to 11 bits loses."""
    leaves = drawn(*SMALL[case], dtype=torch.float32)
    grad = torch.randn_like(leaves["residual"])
    found = run(leaves, grad)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    y = conv3d(**wide, padding="same", impl="reference")
    exact = [y, found[1].double(), *torch.autograd.grad(y, list(wide.values()), grad.double())]
    for one, other in zip(found, exact, strict=True):
        assert (one.double() - other).norm() <= 2**-11 * other.norm()


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
def test_strides_dilation_and_prefix(padding_mode: str) -> None:
    x = torch.randn(2, 16, 5, 9, 10, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(24, 16, 3, 3, 3, device="cuda", dtype=torch.bfloat16).requires_grad_()
    prefix = torch.randn(2, 16, 2, 9, 10, device="cuda", dtype=torch.bfloat16).requires_grad_()
    hold(conv3d, x, weight, stride=(1, 2, 2), dilation=(1, 1, 2), padding=(2, 0, 1, 1, 2, 2),
         padding_mode=padding_mode, prefix=prefix, impl="cuda", dtype=x.dtype)  # fmt: skip


@pytest.mark.parametrize("channels", [32, 6])
def test_norm_on_the_way_in(channels: int) -> None:
    x = torch.randn(2, channels, 5, 9, 10, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=LAST)
    weight = torch.randn(24, channels, 3, 3, 3, device="cuda", dtype=torch.bfloat16)
    scale, shift = (torch.randn(2, channels, 5, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    hold(norm_silu_conv3d, x, 2, None, None, weight, stats=moments(x, 2), scale=scale, shift=shift, padding="same",
         impl="cuda", dtype=x.dtype, gradients=False)  # fmt: skip


@pytest.mark.parametrize("case", SMALL)
def test_same_bits_250_times(case: str) -> None:
    leaves, grad = clips(case)
    first = run(leaves, grad)
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(run(leaves, grad), first, strict=True))


@pytest.mark.parametrize("case", SMALL)
def test_graph_capture(case: str) -> None:
    """A replay on new values gives the bits of an eager call on them."""
    leaves, grad = clips(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(leaves, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(leaves, grad)
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(leaves, grad), strict=True))


@pytest.mark.parametrize("case", SMALL)
def test_never_synchronises(case: str) -> None:
    leaves, grad = clips(case)
    run(leaves, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(leaves, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_forward_allocates_its_result_and_nothing_else() -> None:
    leaves = drawn(*STANDARD["animatediff-l1 1x3x3"])
    with torch.no_grad():
        conv3d(**leaves, padding="same", impl="cuda")
        leaves["bias"], leaves["channel_bias"] = leaves["bias"].float(), leaves["channel_bias"].float()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = conv3d(**leaves, padding="same", impl="cuda")
        assert torch.cuda.max_memory_allocated() - before <= y.numel() * y.element_size() + 1024


HOPPER = ("cuda_sm90", "cuda_sm90_cluster")


def needs_sm90() -> None:
    """Skip where the kernel for capability 9.0 does not run."""
    reason = registration._not_sm90a()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("impl", ["cuda", *HOPPER])
def test_large_offsets(impl: str) -> None:
    """The last frames of the second sample, where a 32-bit offset has wrapped, against a small call on them alone.

    Of the cotangent only they are not zero, so the weight's gradient is theirs too. 20 GB: x, y and their gradients.
    """
    if impl in HOPPER:
        needs_sm90()
    x = torch.empty((2, 64, 16, 1024, 1040), device="cuda", dtype=torch.bfloat16, memory_format=LAST).normal_()
    weight = torch.randn(64, 64, 3, 1, 1, device="cuda", requires_grad=True)
    assert x.numel() > 2**31
    part = x[1:, :, 12:].clone(memory_format=LAST).requires_grad_()
    y, near = (conv3d(t.requires_grad_(), weight, padding="same", impl=impl) for t in (x, part))
    assert torch.equal(y[1:, :, 13:], near[:, :, 1:])
    grad = torch.zeros_like(y)
    grad[1:, :, 13:].normal_()
    near_grad = grad[1:, :, 12:].clone(memory_format=LAST)
    dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    near_dx, near_dweight = torch.autograd.grad(near, (part, weight), near_grad)
    assert torch.equal(dx[1:, :, 12:], near_dx)
    assert (dweight - near_dweight).norm() <= 1e-4 * near_dweight.norm()


# (B, C, T, H, W), C_out, kernel, further arguments
WARPGROUP = {
    "svd-l0 1x3x3": ((2, 320, 25, 72, 128), 320, (1, 3, 3), {}),
    "svd-l0 3x1x1": ((2, 320, 25, 72, 128), 320, (3, 1, 1), {}),
    "svd-l3 3x1x1": ((2, 1280, 25, 9, 16), 1280, (3, 1, 1), {}),
    "vae 3x3x3": ((1, 128, 8, 64, 64), 256, (3, 3, 3), {}),
    "a part of the channels": ((2, 40, 3, 9, 11), 72, (3, 3, 3), {}),
    "dilated": ((1, 64, 4, 20, 22), 128, (3, 3, 3), {"dilation": (1, 2, 2)}),
    "causal": ((1, 64, 5, 20, 22), 64, (3, 3, 3), {"padding": (2, 0, 1, 1, 1, 1)}),
    "strided": ((2, 64, 4, 20, 22), 128, (1, 3, 3), {"padding": (0, 1, 1), "stride": (1, 2, 2)}),
    "a bias of each sample": ((3, 64, 4, 20, 22), 96, (3, 1, 1), {}),
}


def warpgroup_call(case: str, impl: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A case's leaves and its other arguments."""
    shape, outputs, kernel, more = WARPGROUP[case]
    leaves = drawn(shape, outputs, kernel)
    if "stride" in more:
        del leaves["residual"], leaves["channel_bias"]
    if "sample" in case:
        leaves["channel_bias"] = leaves["channel_bias"].detach()[:, :, 0].requires_grad_()
    return leaves, {"padding": "same", **more, "impl": impl}


@pytest.mark.parametrize("impl", HOPPER)
@pytest.mark.parametrize("case", WARPGROUP)
def test_graph_capture_of_warpgroups(case: str, impl: str) -> None:
    needs_sm90()
    leaves, options = warpgroup_call(case, impl)
    with torch.no_grad():
        first = conv3d(**leaves, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = conv3d(**leaves, **options)
    graph.replay()
    assert torch.equal(captured, first)


@pytest.mark.parametrize("impl", HOPPER)
@pytest.mark.parametrize("case", WARPGROUP)
def test_warpgroups(case: str, impl: str) -> None:
    """Against float64, and the same bits 100 times."""
    needs_sm90()
    leaves, options = warpgroup_call(case, impl)
    first = conv3d(**leaves, **options)
    for _ in range(100):
        assert torch.equal(conv3d(**leaves, **options), first)
    x, weight = leaves.pop("x"), leaves.pop("weight")
    hold(conv3d, x, weight, **options, dtype=x.dtype, seed=2**17, **leaves,
         baseline=lambda *a, **k: conv3d(*a, **k, impl="reference"))  # fmt: skip
