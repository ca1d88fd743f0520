"""Attention inside a frame, and to the first and previous frame, against one frame at a time."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvdiff import dispatch
from fastvdiff.nn import CrossFrameAttention, SpatialAttention
from fastvdiff.nn.attention import Attention

C, HEADS, DIM = 12, 2, 8
FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "channels_last_3d"]
)


def one_frame(module: Attention, frame: torch.Tensor, context: list[torch.Tensor]) -> torch.Tensor:
    """The frame (B, C, H, W) attending to the positions of the frames in `context`."""

    def normed(x: torch.Tensor) -> torch.Tensor:
        return module.norm(x.flatten(2).transpose(1, 2))

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (HEADS, DIM)).transpose(1, 2)

    keys = torch.cat([normed(x) for x in context], dim=1)
    y = F.scaled_dot_product_attention(
        heads(module.to_q(normed(frame))), heads(module.to_k(keys)), heads(module.to_v(keys))
    )
    y = module.to_out[0](y.transpose(1, 2).flatten(2))
    return frame + y.transpose(1, 2).unflatten(2, frame.shape[2:])


@FORMATS
def test_spatial_attention_stays_in_its_frame(
    memory_format: torch.memory_format, awake: Callable[[nn.Module], nn.Module]
) -> None:
    module = awake(SpatialAttention(C, None, HEADS, DIM))
    x = torch.randn(2, C, 3, 4, 5).contiguous(memory_format=memory_format)
    frames = [one_frame(module, x[:, :, t], [x[:, :, t]]) for t in range(3)]
    torch.testing.assert_close(module(x), torch.stack(frames, dim=2), rtol=1e-4, atol=1e-5)


@FORMATS
def test_cross_frame_attention_sees_first_and_previous(
    memory_format: torch.memory_format, awake: Callable[[nn.Module], nn.Module]
) -> None:
    module = awake(CrossFrameAttention(C, None, HEADS, DIM))
    x = torch.randn(2, C, 4, 3, 5).contiguous(memory_format=memory_format)
    frames = [one_frame(module, x[:, :, t], [x[:, :, 0], x[:, :, max(t - 1, 0)]]) for t in range(4)]
    torch.testing.assert_close(module(x), torch.stack(frames, dim=2), rtol=1e-4, atol=1e-5)


def test_cross_frame_attention_on_one_frame_is_spatial(awake: Callable[[nn.Module], nn.Module]) -> None:
    spatial = awake(SpatialAttention(C, None, HEADS, DIM))
    cross_frame = CrossFrameAttention(C, None, HEADS, DIM)
    cross_frame.load_state_dict(spatial.state_dict())
    x = torch.randn(2, C, 1, 4, 4)
    torch.testing.assert_close(cross_frame(x), spatial(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [SpatialAttention, CrossFrameAttention])
def test_bad_channels(kind: type[Attention]) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: x: expected shape"):
        kind(C)(torch.zeros(1, C + 4, 2, 3, 3))


@pytest.mark.parametrize(("side", "kernel"), [(16, True), (17, False)])
def test_few_tokens_go_to_the_kernel_over_frames(
    side: int, kernel: bool, awake: Callable[[nn.Module], nn.Module]
) -> None:
    """On a CPU in float32, where it was measured; never under the reference, nor under autocast."""
    module, x = awake(SpatialAttention(C, None, HEADS, DIM)), torch.randn(1, C, 2, side, side)
    assert [walk.chosen for walk in dispatch.trace(module, x)] == (["cpu"] if kernel else [])
    with dispatch.use_impl("reference"):
        assert not dispatch.trace(module, x)
        expected = module(x)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert not dispatch.trace(module, x)
