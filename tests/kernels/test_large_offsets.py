"""Offsets past 2^31 elements, on views of address space that is never touched: the interpreter's offsets are real."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastvdiff import ops

FAR = 2**31 + 24  # elements between two samples; a 32-bit offset would land before the first

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the memory is real: see the gpu tests")


@pytest.fixture(autouse=True)
def _overflow_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter raises where a 32-bit sum or product overflows."""
    from triton.runtime.interpreter import interpreter_builder

    options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=True)
    monkeypatch.setattr(interpreter_builder, "options", options)


def far_apart(t: torch.Tensor) -> torch.Tensor:
    """t (two samples) with the second FAR elements after the first, in memory of which only its own pages exist."""
    view = torch.empty(FAR + t[0].numel(), dtype=t.dtype).as_strided(t.shape, (FAR, *t.stride()[1:]))
    return view.copy_(t)


def test_group_norm_silu() -> None:
    for format in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.randn(2, 8, 2, 3, 4).contiguous(memory_format=format).bfloat16()
        y = ops.group_norm_silu(far_apart(x), 2, impl="triton")
        assert y.equal(ops.group_norm_silu(x, 2, impl="triton"))


def test_group_norm_silu_backward() -> None:
    x, grad = torch.randn(2, 8, 2, 3, 4).bfloat16(), torch.randn(2, 8, 2, 3, 4).bfloat16()
    near, far = x.clone().requires_grad_(), far_apart(x).requires_grad_()
    for leaf, g in ((near, grad), (far, far_apart(grad))):
        ops.group_norm_silu(leaf, 2, impl="triton").backward(g)
    assert far.grad.equal(near.grad)


def test_temporal_attention() -> None:
    q, k, v, grad = (torch.randn(2, 3, 5, 2, 16).bfloat16() for _ in range(4))
    results = []
    for draw in (torch.clone, far_apart):
        leaves = [draw(t).requires_grad_() for t in (q, k, v)]
        y = ops.temporal_attention(*leaves, impl="triton")
        results.append([y, *torch.autograd.grad(y, leaves, draw(grad))])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_temporal_attention_block() -> None:
    x, grad = (torch.randn(2, 16, 3, 2, 2).bfloat16() for _ in range(2))
    weights = [torch.randn(16, 16).bfloat16() / 4 for _ in range(4)]
    results = []
    for draw in (torch.clone, far_apart):
        leaf = draw(x).requires_grad_()
        y = ops.temporal_attention_block(leaf, *weights, heads=1, impl="triton")
        results.append([y, *torch.autograd.grad(y, leaf, draw(grad))])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
