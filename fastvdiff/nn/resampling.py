"""Spatial down- and upsampling by two; frames are kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fastvdiff import checks
from fastvdiff.reference.conv3d import is_channels_last

from .conv3d import Conv3d


def _by_image(resample: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`resample` of every frame, in channels_last_3d: torch's kernels for images are many times its others there."""
    images = x.contiguous(memory_format=torch.channels_last_3d).transpose(1, 2).flatten(0, 1)
    return resample(images).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Downsample3d(nn.Module):
    """Halve height and width (rounding up): a strided (1, k, k) convolution, or 2x2 averages.

    Arguments and keys as in diffusers' `Downsample2D`.

    Args:
        channels: input channels.
        use_conv: convolve with stride (1, 2, 2); otherwise average, and out_channels must equal channels.
        out_channels: output channels, `channels` if None.
        kernel_size: of the convolution, odd.

    Raises:
        ValueError: averaging is asked to change the channels.
    """

    def __init__(
        self, channels: int, use_conv: bool = False, out_channels: int | None = None, kernel_size: int = 3
    ) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        half = kernel_size // 2
        if use_conv:
            self.conv = Conv3d(
                channels, out_channels, (1, kernel_size, kernel_size), stride=(1, 2, 2), padding=(0, half, half)
            )
        elif out_channels == channels:
            self.conv = None
        else:
            checks.fail("Downsample3d", "out_channels", f"{channels} as channels without use_conv", out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, C_out, T, ceil(H / 2), ceil(W / 2))."""
        if self.conv is not None:
            return self.conv(x)
        if is_channels_last(x):
            return _by_image(lambda images: F.avg_pool2d(images, 2, ceil_mode=True), x)
        return F.avg_pool3d(x, (1, 2, 2), ceil_mode=True)


class Upsample3d(nn.Module):
    """Double height and width by repetition, then a (1, k, k) convolution.

    Arguments and keys as in diffusers' `Upsample2D`.

    Args:
        channels: input channels.
        use_conv: convolve afterwards; otherwise out_channels must equal channels.
        out_channels: output channels, `channels` if None.
        kernel_size: of the convolution, odd.

    Raises:
        ValueError: repetition alone is asked to change the channels.
    """

    def __init__(
        self, channels: int, use_conv: bool = False, out_channels: int | None = None, kernel_size: int = 3
    ) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        half = kernel_size // 2
        if use_conv:
            self.conv = Conv3d(channels, out_channels, (1, kernel_size, kernel_size), padding=(0, half, half))
        elif out_channels == channels:
            self.conv = None
        else:
            checks.fail("Upsample3d", "out_channels", f"{channels} as channels without use_conv", out_channels)

    def forward(self, x: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, C_out, T, *output_size); (2 H, 2 W) if None, one less undoes an odd Downsample3d."""
        height, width = x.shape[3:]
        x = _by_image(lambda images: F.interpolate(images, size=(2 * height, 2 * width)), x)
        if output_size is not None:
            x = x[..., : output_size[0], : output_size[1]]
        return x if self.conv is None else self.conv(x)
