"""Self-attention over the positions of each frame."""

from __future__ import annotations

import torch

from .attention import Attention
from .tokens import from_tokens, to_tokens


class SpatialAttention(Attention):
    """Pre-norm self-attention over the H*W positions of every frame by itself, plus the input.

    Equivalent to, with frames folded into the batch::

        y = norm(x)                                              # (B*T, S, C)
        x + to_out(F.scaled_dot_product_attention(to_q(y), to_k(y), to_v(y)))

    Arguments as in `Attention`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, C, T, H, W)."""
        self.check_video(x)
        frames = to_tokens(x).flatten(0, 1)
        normed = self.normed(frames)
        y = self.attend(self.to_q(normed), self.to_k(normed), self.to_v(normed))
        return x + from_tokens(y.unflatten(0, (x.shape[0], x.shape[2])), *x.shape[3:])
