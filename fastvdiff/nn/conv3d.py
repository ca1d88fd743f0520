"""Video convolutions: `Conv3d` with fused epilogue, and its space-time factorisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastvdiff import checks, ops
from fastvdiff.ops.conv3d import impl_of
from fastvdiff.ops.norm_silu_conv3d import normalises_as_it_reads as _normalises_as_it_reads

from .group_norm_silu import GroupNormSiLU
from .hooks import untouched

KINDS = ("spatial", "factorized", "full")

_OP_MODES = ("zeros", "replicate")
_COPY_MODES = ("reflect", "circular")


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` whose bias, channel bias and residual are added while the output is still in registers.

    Equivalent to::

        y = F.conv3d(F.pad(x, (w0, w1, h0, h1, t0, t1), mode), weight, bias, stride, 0, dilation, groups)
        y = y + channel_bias[:, :, None, None, None] + residual

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype: as in `nn.Conv3d`, with
            its state_dict.
        padding: an int, (t, h, w), "same", "valid", or (t0, t1, h0, h1, w0, w1) for different sides: (2, 0, 1, 1, 1, 1)
            is a convolution causal in time.
        padding_mode: "zeros", "replicate", or one of the two for each dimension (t, h, w), which a kernel adds as it
            reads; without one only zeros that are the same on both sides cost no copy. "reflect" and
            "circular" always pad a copy of the input first.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str | tuple[str, str, str] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # nn.Conv3d knows neither six paddings nor a mode per dimension: it builds the parameters, and the padding
        # it has checked for itself is only the symmetric kind.
        symmetric = isinstance(padding, (str, int)) or len(padding) == 3
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding if symmetric else 0, dilation, groups, bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        if not symmetric:
            if len(padding) != 6 or any(not isinstance(p, int) or p < 0 for p in padding):
                expected = "an int, (t, h, w), 'same', 'valid' or (t0, t1, h0, h1, w0, w1) of ints >= 0"
                checks.fail("Conv3d", "padding", expected, checks.describe(padding))
            self.padding = tuple(padding)
        modes = (padding_mode,) if isinstance(padding_mode, str) else tuple(padding_mode)
        known = all(m in _OP_MODES for m in modes) and len(modes) in (1, 3)
        if not known and padding_mode not in _COPY_MODES:
            expected = "'zeros', 'replicate' (or one of the two for each of t, h, w), 'reflect' or 'circular'"
            checks.fail("Conv3d", "padding_mode", expected, checks.describe(padding_mode))
        self.padding_mode = padding_mode if isinstance(padding_mode, str) else modes

    def forward(
        self, x: torch.Tensor, channel_bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
        stats_groups: int = 0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Convolve x (B, C_in, T, H, W), then add channel_bias (B, C_out) or (B, C_out, T_out), and residual.

        Returns (B, C_out, T_out, H_out, W_out), channels_last_3d where x or the weight is; with `stats_groups` = G, a
        pair: that and its statistics for the next norm (B, G, 2) (see `ops.conv3d`).
        """
        padding, mode = self.padding, self.padding_mode
        if mode in _COPY_MODES:
            x = F.pad(x, self._sides(), mode)
            padding, mode = 0, "zeros"
        return ops.conv3d(
            x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups,
            padding_mode=mode, channel_bias=channel_bias, residual=residual, stats_groups=stats_groups,
        )  # fmt: skip

    def _sides(self) -> tuple[int, ...]:
        """(w0, w1, h0, h1, t0, t1), as F.pad wants them."""
        if isinstance(self.padding, str):
            return tuple(self._reversed_padding_repeated_twice)
        if len(self.padding) == 6:
            t0, t1, h0, h1, w0, w1 = self.padding
            return (w0, w1, h0, h1, t0, t1)
        t, h, w = self.padding
        return (w, w, h, h, t, t)


class FactorizedConv3d(nn.Module):
    """A (1, k, k) convolution over space, then a (k, 1, 1) convolution over time.

    The temporal kernel starts as the identity, so that a fresh module is the spatial convolution alone. The epilogue
    (channel bias, residual) belongs to the temporal convolution.

    Source: Singer et al., "Make-A-Video", arXiv:2209.14792, section 3.2.1 (pseudo-3D convolutions).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        half = kernel_size // 2
        self.spatial = Conv3d(in_channels, out_channels, (1, kernel_size, kernel_size), padding=(0, half, half))
        self.temporal = Conv3d(out_channels, out_channels, (kernel_size, 1, 1), padding=(half, 0, 0))
        nn.init.zeros_(self.temporal.weight)
        nn.init.zeros_(self.temporal.bias)
        # nn.init.dirac_ is the same, channel by channel in Python: seconds for a large network.
        with torch.no_grad():
            self.temporal.weight[:, :, half, 0, 0].fill_diagonal_(1)

    def forward(
        self, x: torch.Tensor, channel_bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
        stats_groups: int = 0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Convolve x (B, C_in, T, H, W); channel_bias (B, C_out) or (B, C_out, T), residual like the output.

        Returns as `Conv3d` does.
        """
        return self.temporal(self.spatial(x), channel_bias=channel_bias, residual=residual, stats_groups=stats_groups)


def leaves_statistics(conv: nn.Module, x: torch.Tensor, sums: bool) -> bool:
    """Whether `conv`, of x, is a `video_conv` whose kernel leaves statistics of its result at no cost.

    `sums`: with a channel bias.
    """
    return _plain(conv) and impl_of(x, _parts(conv)[-1].weight, sums) == "cuda"


def normalises_as_it_reads(norm: nn.Module, conv: nn.Module, x: torch.Tensor) -> bool:
    """Whether one kernel runs `norm` and `conv`, a `video_conv`, of an x with statistics, and nobody watches either."""
    if not (type(norm) is GroupNormSiLU and untouched(norm) and _plain(conv)):
        return False
    return _normalises_as_it_reads(x, _parts(conv)[0].weight, sums=isinstance(conv, Conv3d))


def _parts(conv: nn.Module) -> tuple[nn.Module, ...]:
    """The convolutions that run one after the other."""
    return (conv.spatial, conv.temporal) if isinstance(conv, FactorizedConv3d) else (conv,)


def _plain(conv: nn.Module) -> bool:
    """Whether calling `conv` is nothing but what `video_conv` makes: no hook, subclass, layer or setting of others."""
    return type(conv) in (Conv3d, FactorizedConv3d) and untouched(conv) and all(
        type(part) is Conv3d and untouched(part) and part.padding_mode == "zeros" and part.groups == 1
        and part.stride == part.dilation == (1, 1, 1)
        for part in _parts(conv)
    )  # fmt: skip


def normalised(
    norm: GroupNormSiLU, conv: Conv3d | FactorizedConv3d, x: torch.Tensor, stats: torch.Tensor,
    scale: torch.Tensor | None, shift: torch.Tensor | None, residual: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """conv(norm(x, scale, shift, stats), residual=residual), where `normalises_as_it_reads`."""
    reader, *rest = _parts(conv)
    ends = not rest
    y = ops.norm_silu_conv3d(
        x, norm.num_groups, norm.weight, norm.bias, reader.weight, reader.bias, eps=norm.eps, stats=stats, scale=scale,
        shift=shift, silu=norm.silu, padding=reader.padding, residual=residual if ends else None,
    )  # fmt: skip
    return y if ends else conv.temporal(y, residual=residual)


def video_conv(kind: str, in_channels: int, out_channels: int, zero_init: bool = False) -> Conv3d | FactorizedConv3d:
    """The size-keeping 3-wide convolution of a kind: "spatial" (1,3,3), "factorized" (1,3,3)+(3,1,1), "full" (3,3,3).

    With `zero_init` its output starts at 0. Raises ValueError for an unknown kind.
    """
    if kind == "spatial":
        conv = Conv3d(in_channels, out_channels, (1, 3, 3), padding=(0, 1, 1))
    elif kind == "factorized":
        conv = FactorizedConv3d(in_channels, out_channels)
    elif kind == "full":
        conv = Conv3d(in_channels, out_channels, 3, padding=1)
    else:
        checks.fail("video_conv", "kind", f"one of {', '.join(map(repr, KINDS))}", checks.describe(kind))
    if zero_init:
        nn.init.zeros_(_parts(conv)[0].weight)
        nn.init.zeros_(_parts(conv)[0].bias)
    return conv
