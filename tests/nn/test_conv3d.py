"""Conv3d: nn.Conv3d with more kinds of padding and a fused epilogue; FactorizedConv3d."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvdiff.nn import Conv3d, FactorizedConv3d
from fastvdiff.nn.conv3d import video_conv


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "stride": (1, 2, 2)},
        {"kernel_size": (3, 1, 1), "padding": "same", "bias": False},
        {"kernel_size": 3, "padding": "valid", "groups": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "replicate"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": (1, 3, 3), "padding": "same", "padding_mode": "circular"},
    ],
    ids=lambda a: "-".join(str(v) for v in a.values()),
)
def test_is_torchs(arguments: dict[str, object]) -> None:
    theirs = nn.Conv3d(4, 6, **arguments)
    ours = Conv3d(4, 6, **arguments)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 5, 6, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert repr(ours) == repr(theirs)


def test_causal_padding_sees_no_later_frame() -> None:
    conv = Conv3d(2, 3, 3, padding=(2, 0, 1, 1, 1, 1))
    x = torch.randn(1, 2, 5, 4, 4)
    torch.testing.assert_close(conv(x), F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), conv.weight, conv.bias))
    later = x.clone()
    later[:, :, 3:] += 1
    torch.testing.assert_close(conv(later)[:, :, :3], conv(x)[:, :, :3])


def test_a_mode_per_dimension() -> None:
    conv = Conv3d(2, 3, 3, padding=1, padding_mode=("replicate", "zeros", "zeros"))
    x = torch.randn(1, 2, 4, 5, 6)
    padded = F.pad(F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate"), (1, 1, 1, 1))
    torch.testing.assert_close(conv(x), F.conv3d(padded, conv.weight, conv.bias), rtol=1e-5, atol=1e-5)


def test_epilogue() -> None:
    conv = Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1))
    x, residual, bias = torch.randn(2, 2, 4, 5, 5), torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3)
    expected = conv(x) + bias[:, :, None, None, None] + residual
    torch.testing.assert_close(conv(x, channel_bias=bias, residual=residual), expected)


def test_factorized_starts_as_its_spatial_half() -> None:
    conv = FactorizedConv3d(4, 6)
    x = torch.randn(2, 4, 5, 6, 6)
    torch.testing.assert_close(conv(x), conv.spatial(x))
    nn.init.normal_(conv.temporal.weight)
    torch.testing.assert_close(conv(x), conv.temporal(conv.spatial(x)))


@pytest.mark.parametrize("kind", ["spatial", "factorized", "full"])
def test_video_conv_keeps_sizes(kind: str) -> None:
    x = torch.randn(1, 2, 3, 4, 5)
    assert video_conv(kind, 2, 6)(x).shape == (1, 6, 3, 4, 5)
    assert not video_conv(kind, 2, 6, zero_init=True)(x).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": (1, 1, 1, 1)}, "Conv3d: padding: expected an int"),
        ({"padding": (1, 1, 1, 1, 1, -1)}, "Conv3d: padding: expected an int"),
        ({"padding_mode": "mirror"}, "Conv3d: padding_mode: expected 'zeros', 'replicate'"),
        ({"padding_mode": ("zeros", "zeros", "reflect")}, "Conv3d: padding_mode: expected"),
    ],
    ids=["four-paddings", "negative", "unknown-mode", "reflect-per-dimension"],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conv3d(2, 2, 3, **arguments)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="expected one of 'spatial', 'factorized', 'full', got 'causal'"):
        video_conv("causal", 2, 2)
