"""Offsets past 2^31 elements in the CUDA kernels, on a CPU: views of address space of which only their own pages exist.

Everything that strides can pull apart is: inputs, cotangents, residuals, results and x's gradients, whose values are
then those of dense tensors to the bit. Dense tensors pass 2^31 by their size alone: a weight or its gradient in 131,072
tiles of some 3 ms each under the shim, a table of statistics in 16 million. Those offsets are 64-bit by reading; the
weight gradient's shares have at most 2^25 floats by their count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastvdiff.ops import group_norm_silu
from tests.ops.drawn_group_norm_silu import parameters

from .conv3d_library import native, shim
from .group_norm_silu_library import Library
from .test_conv3d import case, kernels, sizes_of, tensors_of


def spread(t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """t in memory of these strides, which reaches past 2^31 elements."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
    assert elements > 2**31
    return torch.empty(elements, dtype=t.dtype).as_strided(t.shape, strides).copy_(t)


def apart(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Spreads a tensor along `dim` where it has more than one index there."""

    def along(t: torch.Tensor) -> torch.Tensor:
        if t.shape[dim] == 1:
            return t
        far = (2**31 // (t.shape[dim] - 1) // 64 + 1) * 64  # whole 16-byte accesses stay whole
        return spread(t, tuple(far if d == dim else stride for d, stride in enumerate(t.stride())))

    return along


CASES = {
    "chunks": case(16, 24, (3, 4, 5), (3, 3, 3), batch=2, residual=True, groups=6),
    "elements": case(3, 5, (3, 4, 5), (3, 3, 3), batch=2, residual=True, groups=1),
    "contiguous": case(8, 16, (2, 4, 5), (1, 3, 3), batch=2, residual=True, layout="contiguous", channels_last=False),
    "strided": case(8, 16, (3, 5, 6), (1, 3, 3), batch=2, stride=(1, 2, 2)),
    "prefix": case(8, 16, (3, 4, 5), (3, 3, 3), batch=2, sides=(2, 0, 1, 1, 1, 1), prefix=True,
                   modes=("zeros", "replicate", "zeros")),
    "prologue": case(16, 24, (3, 4, 5), (3, 3, 3), batch=2),
    "prologue of elements": case(3, 24, (3, 4, 5), (3, 3, 3), batch=2),
}  # fmt: skip


@pytest.mark.parametrize("dim", range(5), ids=("samples", "channels", "frames", "rows", "columns"))
@pytest.mark.parametrize("name", CASES)
def test_conv3d(name: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, the gradients of x and of a prefix, and the weight's gradient."""
    of, far = CASES[name], apart(dim)
    tensors = tensors_of(of, torch.bfloat16)
    grad = torch.randn(of["batch"], of["outputs"], *sizes_of(of)).bfloat16()
    grad = grad.contiguous(memory_format=torch.channels_last_3d)
    prologue = native.Prologue(torch.randn(2, 3, of["channels"], 2), True) if "prologue" in name else None
    with shim():
        near_y, near_stats, near = kernels(of, tensors, prologue, grad)
        pulled = {key: far(t) if t.dim() == 5 and key != "weight" else t for key, t in tensors.items()}
        plain, plain_like = native.empty, torch.empty_like
        monkeypatch.setattr(native, "empty", lambda *given, **named: far(plain(*given, **named)))
        monkeypatch.setattr(
            torch, "empty_like",
            lambda t, **named: far(torch.full_like(t, torch.nan)) if t is pulled["x"] else plain_like(t, **named),
        )  # fmt: skip
        far_y, far_stats, found = kernels(of, pulled, prologue, far(grad))
    assert sum((size - 1) * stride for size, stride in zip(far_y.shape, far_y.stride(), strict=True)) > 2**31
    assert torch.equal(far_y, near_y)
    assert torch.equal(far_stats, near_stats)
    assert all(torch.equal(found[key], near[key]) for key in near)


def norms(impl: str, x: torch.Tensor, grad: torch.Tensor, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """The result and every gradient."""
    leaves = {"x": x.detach().requires_grad_(), **arguments}
    y = group_norm_silu(num_groups=4, impl=impl, **leaves)
    return [y, *torch.autograd.grad(y, list(leaves.values()), grad)]


SAMPLES, POSITIONS = (2**31, 1, 256, 64, 16), (16, 1, 2**30 + 2**28, 2**28 + 2**26, 2**26 + 2**24)


# Modulated by frame, work begins far off; by sample, it reaches there. Likewise a cluster's 8 blocks, or its only one.
@pytest.mark.parametrize(("form", "multiprocessors"), [("frame", 64), ("sample", 1)], ids=("frames", "whole samples"))
@pytest.mark.parametrize(
    ("impl", "strides"),
    [
        ("cuda", SAMPLES),
        ("cuda", (2**31, 32, 16, 4, 1)),
        ("cuda", POSITIONS),
        ("cuda", (32, 2**27 + 2**24, 16, 4, 1)),
        ("cuda_sm90", SAMPLES),
        ("cuda_sm90", POSITIONS),
    ],
    ids=("samples", "samples, contiguous", "positions", "channels", "clusters, samples", "clusters, positions"),
)
def test_group_norm_silu(
    on_shim: Library, impl: str, strides: tuple[int, ...], form: str, multiprocessors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Forward and every gradient."""
    on_shim.multiprocessors = multiprocessors
    memory_format = torch.channels_last_3d if strides[1] == 1 else torch.contiguous_format
    x, grad = (torch.randn(2, 16, 2, 4, 4).bfloat16().contiguous(memory_format=memory_format) for _ in range(2))
    arguments = parameters(x, form)
    near = norms(impl, x, grad, arguments)
    on_shim.cuts.clear()
    plain_like = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like",
        lambda t, **named: spread(torch.full_like(t, torch.nan), strides) if t.dim() == 5 else plain_like(t, **named),
    )  # fmt: skip
    far = norms(impl, spread(x, strides), spread(grad, strides), arguments)
    if impl == "cuda_sm90":
        assert {ranks for _, ranks in on_shim.cuts} == {1 if form == "sample" else 8}
    assert far[0].stride() == far[1].stride() == strides
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))
