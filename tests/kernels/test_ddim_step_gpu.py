"""ddim_step's Triton kernels: what only a GPU can show."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastvdiff.ops import ddim_step
from fastvdiff.reference.philox import philox_4x32
from tests.closeness import hold
from tests.kernels.whole_ddim_step import everything

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 25, 72, 128), (4, 3, 16, 64, 64), (1, 16, 21, 96, 160)], ids=str)
def test_full_size(dtype: torch.dtype, format: torch.memory_format, shape: tuple[int, ...]) -> None:
    x, out, uncond = (torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=format) for _ in range(3))
    seed, scale = torch.tensor([9], device="cuda"), torch.rand(shape[0], shape[2], device="cuda") * 7
    options: dict[str, Any] = {"uncond_output": uncond, "guidance_scale": scale, "eta": 1.0, "noise_seed": seed}
    hold(ddim_step, x, out, 0.4, 0.7, impl="triton", dtype=dtype, **options)
    more = {"guidance_rescale": 0.7, "dynamic_threshold": (0.995, 3.0)}
    hold(ddim_step, x, out, 0.4, 0.7, impl="triton", dtype=dtype, **options, **more)
    leaves = [t.detach().requires_grad_() for t in (x, out, uncond)]
    hold(
        ddim_step, *leaves[:2], 0.4, 0.7, impl="triton", dtype=dtype, uncond_output=leaves[2], guidance_scale=scale,
        clip_sample=1.0,
    )  # fmt: skip


def test_captured_graph_draws_fresh_noise_and_never_waits() -> None:
    arguments = everything("cuda", torch.bfloat16, (2, 4, 7, 32, 48))
    seed = arguments["noise_seed"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ddim_step(**arguments, impl="triton")  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ddim_step(**arguments, impl="triton")
        replays = []
        for value in (5, 6, 5):
            seed.fill_(value)
            graph.replay()
            replays.append([t.clone() for t in captured])
            eager = ddim_step(**arguments, impl="triton")
            replays[-1].append([a.eq(b).all() for a, b in zip(captured, eager, strict=True)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(same) for *_, equal in replays for same in equal)
    assert torch.equal(replays[0][0], replays[2][0])
    assert not torch.equal(replays[0][0], replays[1][0])


@pytest.mark.parametrize("apart", [False, True], ids=["as one", "sample by sample"])
def test_large_past_2_to_the_31_elements(apart: bool) -> None:
    """Noise and results at the far end are those of a tensor that ends there."""
    shape = (2, 1, 1, 2**15, 2**15 + 64)
    x, out = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seed = torch.tensor([3], device="cuda")
    alpha = torch.full((2,), 0.4, device="cuda") if apart else 0.4
    options = {"dynamic_threshold": (0.995, 1.5)} if apart else {}
    prev, original = ddim_step(x, out, alpha, 0.7, eta=1.0, noise_seed=seed, impl="triton", **options)
    n, tail = prev.numel(), 4096
    x_end, out_end = (t.flatten()[-tail:].float() for t in (x, out))
    x0 = (x_end - math.sqrt(0.6) * out_end) / math.sqrt(0.4)
    if apart:
        s = 1.5  # the 99.5 % quantile of |x0|, whose deviation is 2, lies above the maximum
        x0 = x0.clamp(-s, s) / s
    torch.testing.assert_close(original.flatten()[-tail:].float(), x0, rtol=2**-7, atol=1e-2)
    words = philox_4x32(torch.arange((n - tail) // 4, n // 4, device="cuda"), seed)
    magnitude = (-2 * (words[:, 0::2].float() * 2.0**-32 + 2.0**-33).log()).sqrt()
    angle = (words[:, 1::2] >> 8).double() * (2 * math.pi * 2.0**-24)
    z = torch.stack((magnitude * angle.cos(), magnitude * angle.sin()), -1).flatten().float()
    sigma = math.sqrt(0.3 / 0.6 * (1 - 0.4 / 0.7))
    expected = math.sqrt(0.7) * x0 + math.sqrt(0.3 - sigma**2) * out_end + sigma * z
    torch.testing.assert_close(prev.flatten()[-tail:].float(), expected, rtol=2**-7, atol=2e-2)


def test_many_samples() -> None:
    """More samples than a grid's second axis could count."""
    x, out = torch.randn(70_000, 1, 2, 2, 4, device="cuda"), torch.randn(70_000, 1, 2, 2, 4, device="cuda")
    alphas = torch.rand(70_000, device="cuda") * 0.5 + 0.2
    hold(
        ddim_step, x, out, alphas, 0.9, impl="triton", dtype=torch.float32, uncond_output=torch.randn_like(x),
        guidance_scale=2.0, guidance_rescale=0.5, dynamic_threshold=(0.9, 2.0),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threshold_of_large_samples(dtype: torch.dtype) -> None:
    """With a look before, in clips alike and in one whose rows are not; the reference sorts."""
    x, out, uncond = (torch.randn(2, 4, 16, 128, 256, device="cuda", dtype=dtype) for _ in range(3))
    for values in (out, out * torch.linspace(0.01, 5, 256, device="cuda").to(dtype)):
        hold(
            ddim_step, x, values, 0.5, 0.6, impl="triton", dtype=dtype, uncond_output=uncond, guidance_scale=7.5,
            dynamic_threshold=(0.995, 100.0),
        )  # fmt: skip
