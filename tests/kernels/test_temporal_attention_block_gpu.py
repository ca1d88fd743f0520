"""temporal_attention_block's Triton kernels on a GPU: full size, repeats, graphs, large tensors, no synchronisation."""

from __future__ import annotations

import pytest
import torch

from tests.ops.temporal_attention_block_inputs import LAYOUTS, WEIGHTS, check, drawn, parameters, results
from tests.ops.temporal_attention_inputs import NARROW, rotary_tables

pytestmark = pytest.mark.gpu

STANDARD = {  # shape, heads, D
    "vdm-l0": ((1, 64, 16, 64, 64), 8, 32),
    "vdm-l1": ((1, 128, 16, 32, 32), 8, 32),
    "svd-l0": ((1, 320, 25, 36, 64), 5, 64),
    "animatediff-l0": ((1, 320, 16, 32, 64), 8, 40),
}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize(("shape", "heads", "dim"), STANDARD.values(), ids=STANDARD.keys())
def test_standard_shapes(shape: tuple[int, ...], heads: int, dim: int, layout: str, dtype: torch.dtype) -> None:
    x, p = drawn(shape, dtype, "cuda", layout), parameters(shape[1], heads, dim, shape[2], dtype, "cuda")
    check((x, p | {"heads": heads}, dtype))
    check((x, p | {"heads": heads, "rotary": rotary_tables(shape[2], dim // 2, "cuda"), "is_causal": True}, dtype))


@pytest.mark.parametrize(("channels", "frames", "dim"), [(64, 16, 32), (40, 7, 16)])
@pytest.mark.parametrize("plain", [True, False], ids=("plain", "all"))
def test_tiles_in_part(channels: int, frames: int, dim: int, plain: bool) -> None:
    """Tiles, channels and units that are partly filled; a plain call's weights stay on the multiprocessor."""
    x = drawn((2, channels, frames, 43, 35), torch.bfloat16, "cuda")
    p = parameters(channels, 2, dim, frames, torch.bfloat16, "cuda")
    if plain:
        p = {name: t for name, t in p.items() if name in (*WEIGHTS, "out_bias", "norm_weight", "norm_bias")}
    check((x, p | {"heads": 2}, torch.bfloat16))


def test_same_bits_250_times() -> None:
    """Otherwise: in how many runs each tensor differs, and by how much; only gradients of weights are torch's GEMMs."""
    x, p = drawn((2, 40, 7, 3, 5), torch.bfloat16, "cuda"), parameters(40, 2, 16, 7, device="cuda")
    names = ("y", "x", *p)
    first = results(x, 2, p)
    assert [name for name, t in zip(names, first, strict=True) if not t.isfinite().all()] == []
    apart: dict[str, list[float]] = {}
    for _ in range(249):
        for name, a, b in zip(names, first, results(x, 2, p), strict=True):
            if not torch.equal(a, b):
                apart.setdefault(name, []).append(float((a - b).abs().max()))
    assert {name: f"{len(found)} runs: {found[:4]}" for name, found in apart.items()} == {}


@pytest.mark.parametrize("channels", [64, 320])
def test_replays_from_a_graph_without_waiting(channels: int) -> None:
    """Capture and sync debug mode refuse every call that waits for the device."""
    x, p = drawn((2, channels, 16, 16, 16), torch.bfloat16, "cuda"), parameters(channels, 8, 32, 16, device="cuda")
    p |= {"rotary": rotary_tables(16, 16, "cuda"), "attn_mask": torch.rand(2, 16, device="cuda") > 0.2}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(x, 8, p)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = results(x, 8, p)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(x, 8, p)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_large_offsets(layout: str) -> None:
    """More than 2^31 elements, in more than 65,535 sequences: ends and middle as they are by themselves."""
    width = 2**31 // (64 * 16 * 256) + 3
    format = torch.channels_last_3d if layout == "channels_last" else torch.contiguous_format
    x = torch.empty((1, 64, 16, 256, width), device="cuda", dtype=torch.bfloat16, memory_format=format).normal_()
    x.requires_grad_()
    p = {name: t.detach() for name, t in parameters(64, 8, 32, 16, torch.bfloat16, "cuda").items()}
    far = results(x, 8, p)
    for row in (0, 127, 255):
        near = results(x.detach()[:, :, :, row : row + 1].requires_grad_(), 8, p)
        for a, b in zip(far, near, strict=True):
            torch.testing.assert_close(a[:, :, :, row : row + 1], b, rtol=1e-2, atol=1e-2)
