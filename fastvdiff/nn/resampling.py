"""Spatial down- and upsampling by two; frames are kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastvdiff import checks

from .conv3d import Conv3d


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
        batch, channels, frames, height, width = x.shape
        repeated = x[:, :, :, :, None, :, None].expand(-1, -1, -1, -1, 2, -1, 2)
        # Copying through a channels-last view keeps the repetition one pass over memory in that format.
        x = repeated.permute(0, 2, 3, 4, 5, 6, 1).reshape(batch, frames, 2 * height, 2 * width, channels)
        x = x.permute(0, 4, 1, 2, 3)
        if output_size is not None:
            x = x[..., : output_size[0], : output_size[1]]
        return x if self.conv is None else self.conv(x)
