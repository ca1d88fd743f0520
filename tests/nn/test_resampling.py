"""Down- and upsampling by two in space, against diffusers' on one frame."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D

from fastvdiff.nn import Downsample3d, Upsample3d


def inflated(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value[:, :, None] if value.dim() == 4 else value for key, value in state.items()}


@pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=["even", "odd"])
def test_downsample_is_diffusers(size: tuple[int, int]) -> None:
    theirs = Downsample2D(4, use_conv=True, out_channels=6, name="op")
    ours = Downsample3d(4, use_conv=True, out_channels=6)
    ours.load_state_dict(inflated(theirs.state_dict()))
    x = torch.randn(2, 4, 1, *size)
    torch.testing.assert_close(ours(x), theirs(x[:, :, 0])[:, :, None], rtol=1e-4, atol=1e-5)


def test_upsample_is_diffusers() -> None:
    theirs, ours = Upsample2D(4, use_conv=True, out_channels=6), Upsample3d(4, use_conv=True, out_channels=6)
    ours.load_state_dict(inflated(theirs.state_dict()))
    x = torch.randn(2, 4, 1, 3, 5)
    torch.testing.assert_close(ours(x), theirs(x[:, :, 0])[:, :, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_without_convolution(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 4, 3, 5, 6).contiguous(memory_format=memory_format)
    torch.testing.assert_close(Downsample3d(4)(x), F.avg_pool3d(x, (1, 2, 2), ceil_mode=True))
    up = Upsample3d(4)(x)
    assert torch.equal(up, F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))
    assert up.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("height", [5, 6])
@pytest.mark.parametrize("width", [7, 8])
def test_upsampling_undoes_the_size_of_downsampling(height: int, width: int) -> None:
    x = torch.randn(1, 4, 2, height, width)
    down = Downsample3d(4, use_conv=True)(x)
    assert Upsample3d(4, use_conv=True)(down, output_size=(height, width)).shape == x.shape


@pytest.mark.parametrize("kind", [Downsample3d, Upsample3d])
def test_channels_without_convolution(kind: type[torch.nn.Module]) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: out_channels: expected 4 as channels without use_conv"):
        kind(4, out_channels=8)
