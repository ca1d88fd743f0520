"""ResnetBlock3d and FeedForward against diffusers', and both time conditionings."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward as DiffusersFeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from fastvdiff.nn import FeedForward, ResnetBlock3d


@pytest.mark.parametrize("norm", ["default", "scale_shift"])
@pytest.mark.parametrize("channels", [(8, 8), (8, 16)], ids=["same", "wider"])
def test_is_diffusers_on_one_frame(norm: str, channels: tuple[int, int]) -> None:
    settings = {"temb_channels": 12, "groups": 4, "time_embedding_norm": norm}
    theirs = ResnetBlock2D(in_channels=channels[0], out_channels=channels[1], **settings)
    ours = ResnetBlock3d(*channels, **settings)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(
        {key: value[:, :, None] if value.dim() == 4 else value for key, value in theirs.state_dict().items()}
    )
    x, temb = torch.randn(2, channels[0], 1, 6, 5), torch.randn(2, 12)
    torch.testing.assert_close(ours(x, temb), theirs(x[:, :, 0], temb)[:, :, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conv", ["spatial", "factorized", "full"])
@pytest.mark.parametrize("norm", ["default", "scale_shift"])
def test_equals_its_docstring(conv: str, norm: str, awake: Callable[[nn.Module], nn.Module]) -> None:
    block = awake(ResnetBlock3d(8, 16, temb_channels=12, groups=4, conv=conv, time_embedding_norm=norm))
    x, temb = torch.randn(2, 8, 5, 4, 3), torch.randn(2, 12)
    h = block.conv1(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, block.norm1.eps)))
    time = block.time_emb_proj(F.silu(temb))[:, :, None, None, None]
    second = (4, block.norm2.weight, block.norm2.bias, block.norm2.eps)
    if norm == "default":
        h = F.silu(F.group_norm(h + time, *second))
    else:
        scale, shift = time.chunk(2, dim=1)
        h = F.silu(F.group_norm(h, *second) * (1 + scale) + shift)
    torch.testing.assert_close(block(x, temb), block.conv_shortcut(x) + block.conv2(h), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conv", ["spatial", "factorized", "full"])
def test_zero_init_starts_at_the_shortcut_and_learns(conv: str) -> None:
    block = ResnetBlock3d(8, temb_channels=None, groups=4, conv=conv, zero_init=True)
    x = torch.randn(2, 8, 3, 4, 4)
    torch.testing.assert_close(block(x), x)
    block(x).square().sum().backward()
    assert any(p.grad.any() for p in block.conv2.parameters())


def test_dropout_only_in_training() -> None:
    block = ResnetBlock3d(8, temb_channels=None, groups=4, dropout=0.5)
    x = torch.randn(2, 8, 3, 4, 4)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResnetBlock3d(8, time_embedding_norm="ada"), "time_embedding_norm: expected 'default'"),
        (lambda: ResnetBlock3d(8, groups=4)(torch.zeros(1, 8, 1, 2, 2)), "temb: expected the time embedding"),
        (
            lambda: ResnetBlock3d(8, groups=4, temb_channels=None)(torch.zeros(1, 8, 1, 2, 2), torch.zeros(1, 4)),
            "temb: expected None",
        ),
    ],
    ids=["norm", "missing", "unwanted"],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_feed_forward_is_diffusers() -> None:
    theirs = DiffusersFeedForward(8, 12, mult=3, activation_fn="geglu")
    ours = FeedForward(8, 12, mult=3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not FeedForward(8, zero_init=True)(x).any()
