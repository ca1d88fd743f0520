"""Attention from each frame to the first and the previous one."""

from __future__ import annotations

import torch

from .attention import Attention
from .tokens import from_tokens, to_tokens


class CrossFrameAttention(Attention):
    """Pre-norm attention from the positions of frame t to those of frames 0 and max(t - 1, 0), plus the input.

    It takes the place of spatial self-attention, with the same parameters, and ties a video's look to its first frame.
    Equivalent to, for each frame t::

        y = norm(x)                                              # (B, T, S, C)
        context = torch.cat([y[:, 0], y[:, max(t - 1, 0)]], dim=1)
        x[:, t] + to_out(F.scaled_dot_product_attention(to_q(y[:, t]), to_k(context), to_v(context)))

    Arguments as in `Attention`.

    Source: Wu et al., "Tune-A-Video", arXiv:2212.11565, equation 4 (sparse spatio-temporal attention).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, C, T, H, W)."""
        self.check_video(x)
        normed = self.normed(to_tokens(x))
        k, v = _first_and_previous(self.to_k(normed)), _first_and_previous(self.to_v(normed))
        y = self.attend(self.to_q(normed).flatten(0, 1), k, v)
        return x + from_tokens(y.unflatten(0, normed.shape[:2]), *x.shape[3:])


def _first_and_previous(projected: torch.Tensor) -> torch.Tensor:
    """(B, T, S, E) -> (B*T, 2*S, E): beside each frame's first frame its previous one."""
    first = projected[:, :1]
    previous = torch.cat([first, projected[:, :-1]], dim=1)
    return torch.cat([first.expand_as(previous), previous], dim=2).flatten(0, 1)
