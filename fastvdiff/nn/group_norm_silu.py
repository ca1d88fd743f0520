"""GroupNorm followed by SiLU, as one module."""

from __future__ import annotations

import torch
from torch import nn

from fastvdiff import ops


class GroupNormSiLU(nn.GroupNorm):
    """`nn.GroupNorm`, then `* (1 + scale) + shift` where given, then SiLU, in one pass over memory.

    Equivalent to::

        y = F.group_norm(x, num_groups, weight, bias, eps)
        y = F.silu(y * (1 + scale) + shift)

    Args:
        num_groups, num_channels, eps, affine, device, dtype, bias: as in `nn.GroupNorm`, with its state_dict.
        silu: False leaves the activation out.

    Raises:
        ValueError: `num_groups` does not divide `num_channels`.

    Source: Wu & He, "Group Normalization", arXiv:1803.08494.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        silu: bool = True,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        if not bias:
            # Older torch has no such argument.
            self.register_parameter("bias", None)
        self.silu = silu

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None,
        stats: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Normalise x (B, C, *spatial); scale and shift are (B, C), or (B, C, T) for a 5-D x.

        `stats` (B, G, 2): x's statistics, as the convolution that made x leaves them (see `ops.conv3d`).
        """
        return ops.group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, scale=scale, shift=shift, silu=self.silu, stats=stats
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        return super().extra_repr() + ("" if self.silu else ", silu=False")
