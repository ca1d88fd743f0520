"""temporal_attention_block's Triton kernels: on a GPU, else on the CPU under the interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from fastvdiff.kernels import launch, temporal_attention_block_workspace
from fastvdiff.ops import temporal_attention_block as block
from tests.closeness import hold
from tests.ops.drawn_temporal_attention_block import calls
from tests.ops.temporal_attention_block_inputs import LAYOUTS, check, drawn, parameters, results
from tests.ops.temporal_attention_inputs import NARROW, rotary_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORWARD, BACKWARD = "temporal_attention_block", "temporal_attention_block_backward"
Drawn = tuple[torch.Tensor, dict[str, Any], torch.dtype]


@settings(max_examples=300)
@given(calls(DEVICE, limit=900))
def test_holds_to_float64(call: Drawn) -> None:
    check(call)


@pytest.mark.parametrize(
    ("shape", "heads", "dim"),
    [((1, 160, 3, 1, 7), 2, 40), ((1, 96, 16, 1, 5), 1, 24), ((1, 24, 33, 1, 3), 2, 8), ((1, 16, 64, 1, 2), 1, 128),
     ((1, 5, 8, 3, 7), 3, 16), ((1, 64, 4, 1, 7), 8, 32)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sizes(shape: tuple[int, ...], heads: int, dim: int, dtype: torch.dtype, device: str) -> None:
    """Channels in two parts or chunks, units of one or many positions, heads in groups."""
    options = parameters(shape[1], heads, dim, shape[2], dtype, device)
    options |= {"rotary": rotary_tables(shape[2], dim // 2, device)}
    hold(block, drawn(shape, dtype, device), impl="triton", dtype=dtype, heads=heads, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    x, options = drawn((2, 8, 3, 3, 5), torch.float32, device, layout), parameters(8, 2, 4, 3, device=device)
    check((x, options | {"heads": 2}, torch.float32))


@pytest.mark.parametrize(("channels", "chunk"), [(12, 16), (40, 64)])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_resident_weights(dtype: torch.dtype, channels: int, chunk: int, device: str) -> None:
    """A program that keeps the weights walks over its tiles; some programs have one tile less than others."""
    x, options = drawn((1, channels, 9, 1, 6), dtype, device), parameters(channels, 3, 16, 9, dtype, device)
    options |= {"heads": 3, "rotary": rotary_tables(9, 8, device), "impl": "triton"}
    with launch.recorded() as launches, torch.no_grad():
        block(x, **options)
    used = {"UNITS": 1, "GROUP": 2, "CHUNK": chunk, "RESIDENT": True, "num_warps": 4, "num_stages": 1}
    with launch.trying(FORWARD, launches[0].shape_class, used):
        hold(block, x, dtype=dtype, gradients=False, **options)


@pytest.mark.parametrize(("channels", "frames"), [(24, 16), (136, 9)])
def test_every_candidate_configuration(channels: int, frames: int, device: str) -> None:
    """Under the interpreter, where warps do not exist, one of each tile."""
    x, options = drawn((1, channels, frames, 1, 3), torch.bfloat16, device), parameters(channels, 2, 8, frames)
    options = {name: p.to(device).detach().requires_grad_() for name, p in options.items()} | {"heads": 2}
    with launch.recorded() as launches:
        check((x, options, torch.bfloat16))
    tried = set()
    for name in (FORWARD, BACKWARD):
        recorded = next(record for record in launches if record.kernel == name)
        for candidate in recorded.candidates:
            tile = tuple(v for key, v in candidate.items() if device == "cuda" or not key.startswith("num_"))
            if (name, tile) in tried:
                continue
            tried.add((name, tile))
            with launch.trying(name, recorded.shape_class, candidate):
                check((x, options, torch.bfloat16))


@pytest.mark.parametrize("channels", [16, 136])
def test_workspace_of_one_tile(channels: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are summed over several passes through a workspace with room for one tile."""
    monkeypatch.setattr(temporal_attention_block_workspace, "WORKSPACE_BYTES", 1)
    x, options = drawn((2, channels, 16, 1, 5), torch.float32, device), parameters(channels, 2, 8, 16, device=device)
    check((x, options | {"heads": 2}, torch.float32))


@pytest.mark.parametrize("channels", [8, 136])
@pytest.mark.parametrize("wanted", ["k_weight", "out_weight", "q_bias", "norm_weight", "frame_embedding", "attn_bias"])
def test_gradients_only_where_wanted(wanted: str, channels: int, device: str) -> None:
    x, p = (
        torch.randn(1, channels, 4, 1, 5, device=device),
        parameters(channels, 2, 4, 4, device=device, gradients=False),
    )
    p[wanted].requires_grad_()
    found, expected = (
        torch.autograd.grad(block(x, heads=2, impl=impl, **p).square().sum(), p[wanted])[0]
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 8, 4, 3, 5), (2, 8, 4, 0, 5), (2, 8, 0, 3, 5)], ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    x, p = torch.randn(shape, device=device, requires_grad=True), parameters(8, 2, 4, shape[2], device=device)
    y = block(x, heads=2, impl="triton", **p)
    assert y.shape == x.shape
    for gradient in torch.autograd.grad(y.sum(), [x, *p.values()], allow_unused=True):
        assert gradient is None or not gradient.any()


@pytest.mark.parametrize("frames", [4, 9])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_non_finite_stays_in_its_position(value: float, frames: int, device: str) -> None:
    x, p = torch.randn(1, 8, frames, 3, 5, device=device), parameters(8, 2, 4, frames, device=device)
    x[0, 3, 1, 1, 2] = value
    y = block(x, heads=2, impl="triton", **p)
    assert y[0, :, :, 1, 2].isnan().all()
    y[0, :, :, 1, 2] = 0
    assert y.isfinite().all()


def test_constant_rows_with_no_epsilon(device: str) -> None:
    """Rows of a tile that stand for no frame must not bring their 0 / 0 into the sums of the gradients."""
    x, p = torch.randn(1, 8, 3, 3, 3, device=device, requires_grad=True), parameters(8, 2, 4, 3, device=device)
    assert all(t.isfinite().all() for t in results(x, 2, {**p, "eps": 0.0}))


def test_large_mean(device: str) -> None:
    x = (torch.randn(1, 40, 5, 1, 4) + 1e4).to(device).requires_grad_()
    check((x, parameters(40, 2, 8, 5, device=device) | {"heads": 2, "residual": False}, torch.float32))


def test_a_frame_with_nothing_to_attend_to_gives_the_output_bias(device: str) -> None:
    x, p = torch.randn(1, 8, 4, 3, 5, device=device), parameters(8, 2, 4, 4, device=device)
    mask = torch.ones(1, 4, 4, dtype=torch.bool, device=device)
    mask[0, 2] = False
    y = block(x, heads=2, attn_mask=mask, residual=False, impl="triton", **p)
    torch.testing.assert_close(y[:, :, 2], p["out_bias"][None, :, None, None].expand(1, 8, 3, 5))


@pytest.mark.parametrize(
    ("shape", "dim", "reason"),
    [
        ((1, 328, 4, 1, 1), 8, "channels up to 320, not 328"),
        ((1, 8, 65, 1, 1), 8, "frames up to 64, not 65"),
        ((1, 8, 4, 1, 1), 136, "a head dimension D up to 128, not 136"),
    ],
)
def test_refuses(shape: tuple[int, ...], dim: int, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        block(torch.randn(shape), heads=2, impl="triton", **parameters(shape[1], 2, dim, shape[2]))


def test_same_bits_twice(device: str) -> None:
    x, p = drawn((2, 40, 7, 3, 5), torch.bfloat16, device), parameters(40, 2, 16, 7, device=device)
    assert all(torch.equal(a, b) for a, b in zip(results(x, 2, p), results(x, 2, p), strict=True))
