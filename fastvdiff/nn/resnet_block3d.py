"""The residual block of video U-Nets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastvdiff import checks

from .conv3d import Conv3d, leaves_statistics, normalised, normalises_as_it_reads, video_conv
from .group_norm_silu import GroupNormSiLU
from .hooks import untouched

TIME_CONDITIONING = ("default", "scale_shift")


class ResnetBlock3d(nn.Module):
    """Norm, SiLU, convolution, twice, conditioned on the diffusion time, plus the input.

    Equivalent to::

        h = conv1(silu(norm1(x)))
        t = time_emb_proj(silu(temb))                    # "default": h = h + t; h = silu(norm2(h))
        scale, shift = t.chunk(2, dim=1)                 # "scale_shift": h = silu(norm2(h) * (1 + scale) + shift)
        conv_shortcut(x) + conv2(dropout(h))

    where norm, modulation and SiLU are one op, and the time and the residual are added inside the convolutions. Where
    kernels run the convolutions, the first leaves the second norm's statistics and the second applies that norm. Groups
    are normalised over a whole clip, frames included. Arguments and keys as in diffusers' `ResnetBlock2D`.

    Args:
        in_channels, out_channels: channels; `out_channels` is `in_channels` if None.
        dropout: before the second convolution.
        temb_channels: width of the time embedding, or None for a block without.
        groups: of both norms; divides both channel counts.
        eps: of both norms.
        time_embedding_norm: "default" adds the time, "scale_shift" modulates the second norm.
        conv: "spatial", "factorized" or "full" (see `video_conv`).
        zero_init: start the second convolution at 0, so that a fresh block is its shortcut.

    Raises:
        ValueError: an argument is wrong; the message names it.

    Source: Ho et al., arXiv:2204.03458, section 3; scale and shift as in Dhariwal & Nichol, arXiv:2105.05233.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        dropout: float = 0.0,
        temb_channels: int | None = 512,
        groups: int = 32,
        eps: float = 1e-6,
        *,
        time_embedding_norm: str = "default",
        conv: str = "spatial",
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        if time_embedding_norm not in TIME_CONDITIONING:
            checks.fail("ResnetBlock3d", "time_embedding_norm", "'default' or 'scale_shift'", repr(time_embedding_norm))
        self.modulates = time_embedding_norm == "scale_shift"
        self.norm1 = GroupNormSiLU(groups, in_channels, eps)
        self.conv1 = video_conv(conv, in_channels, out_channels)
        self.time_emb_proj = None
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels * (2 if self.modulates else 1))
        self.norm2 = GroupNormSiLU(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = video_conv(conv, out_channels, out_channels, zero_init=zero_init)
        self.conv_shortcut = Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C_in, T, H, W) and the time embedding (B, temb_channels) -> (B, C_out, T, H, W)."""
        if (temb is None) != (self.time_emb_proj is None):
            expected = "the time embedding (B, temb_channels)" if temb is None else "None, as temb_channels is None"
            checks.fail("ResnetBlock3d", "temb", expected, checks.describe(temb))
        time = None if temb is None else self.time_emb_proj(F.silu(temb))
        scale, shift = time.chunk(2, dim=1) if time is not None and self.modulates else (None, None)
        added = None if self.modulates else time
        if not leaves_statistics(self.conv1, x, sums=added is not None):
            h = self.dropout(self.norm2(self.conv1(self.norm1(x), channel_bias=added), scale, shift))
            return self.conv2(h, residual=self._shortcut(x))
        h, stats = self.conv1(self.norm1(x), channel_bias=added, stats_groups=self.norm2.num_groups)
        if self._drops_nothing() and normalises_as_it_reads(self.norm2, self.conv2, h):
            return normalised(self.norm2, self.conv2, h, stats, scale, shift, self._shortcut(x))
        return self.conv2(self.dropout(self.norm2(h, scale, shift, stats)), residual=self._shortcut(x))

    def _drops_nothing(self) -> bool:
        """Whether the dropout need not be called."""
        idle = type(self.dropout) is nn.Dropout and not (self.dropout.training and self.dropout.p > 0)
        return idle and untouched(self.dropout)

    def _shortcut(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.conv_shortcut is None else self.conv_shortcut(x)
