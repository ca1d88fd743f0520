"""CrossAttention makes the text's keys and values once, and gives what one frame at a time gives."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastvdiff.nn import CrossAttention

B, C, T, H, W, L, TEXT = 2, 12, 4, 3, 5, 7, 10


@pytest.fixture
def module(awake: Callable[[nn.Module], nn.Module]) -> CrossAttention:
    return awake(CrossAttention(C, TEXT, heads=2, dim_head=8))


@pytest.mark.parametrize("masked", [False, True])
def test_equals_one_frame_at_a_time(module: CrossAttention, masked: bool) -> None:
    x, context = torch.randn(B, C, T, H, W), torch.randn(B, L, TEXT)
    mask = torch.rand(B, L) > 0.4 if masked else None
    together = module(x, context, mask)
    apart = torch.cat([module(x[:, :, t : t + 1], context, mask) for t in range(T)], dim=2)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_text_is_projected_once_for_a_video(module: CrossAttention) -> None:
    rows = []
    module.to_k.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1].numel()))
    module(torch.randn(B, C, T, H, W), torch.randn(B, L, TEXT))
    assert rows == [B * L]


def test_masked_tokens_do_not_count(module: CrossAttention) -> None:
    x, context = torch.randn(B, C, T, H, W), torch.randn(B, L, TEXT)
    mask = torch.arange(L).expand(B, L) < 4
    torch.testing.assert_close(module(x, context, mask), module(x, context[:, :4]), rtol=1e-4, atol=1e-5)


def test_a_text_with_no_token_adds_only_the_bias(module: CrossAttention) -> None:
    x, context = torch.randn(B, C, T, H, W, requires_grad=True), torch.randn(B, L, TEXT, requires_grad=True)
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[1] = False
    y = module(x, context, mask)
    torch.testing.assert_close(y[1], x[1] + module.to_out[0].bias[:, None, None, None])
    gradients = torch.autograd.grad(y.square().sum(), [x, context])
    assert all(torch.isfinite(g).all() for g in gradients)
    assert not gradients[1][1].any()


@pytest.mark.parametrize(
    ("context", "mask", "message"),
    [
        (torch.zeros(B, L, TEXT + 1), None, r"context: expected shape \(B, L, D\) = \(2, L, 10\), got \(2, 7, 11\)"),
        (torch.zeros(B + 1, L, TEXT), None, "context: expected shape"),
        (torch.zeros(B, L, TEXT), torch.ones(B, L + 1, dtype=torch.bool), "context_mask: expected a bool tensor"),
        (torch.zeros(B, L, TEXT), torch.ones(B, L), "context_mask: expected a bool tensor of shape"),
    ],
    ids=["width", "batch", "mask-length", "mask-dtype"],
)
def test_bad_text(module: CrossAttention, context: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(torch.zeros(B, C, T, H, W), context, mask)
