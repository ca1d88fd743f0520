"""Attention from every position of a video to its text."""

from __future__ import annotations

import torch

from fastvdiff import checks

from .attention import Attention
from .tokens import from_tokens, to_tokens


class CrossAttention(Attention):
    """Pre-norm attention from all T*H*W positions to the text, plus the input.

    Keys and values are made once for a video, not once for a frame: all positions of all frames are the queries of one
    attention call. Equivalent to, for each frame t::

        x[:, :, t] + to_out(F.scaled_dot_product_attention(to_q(norm(x[:, :, t])), to_k(context), to_v(context)))

    Arguments as in `Attention`; `context_dim` is the text width.
    """

    def forward(self, x: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend from x to context.

        Args:
            x: (B, C, T, H, W).
            context: (B, L, context_dim), the text's hidden states.
            context_mask: (B, L) bool, True for a token that may be attended to; a text with none adds only the bias of
                the output projection.

        Returns:
            (B, C, T, H, W).

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        self.check_video(x)
        batch = x.shape[0]
        if context.dim() != 3 or context.shape[0] != batch or context.shape[2] != self.to_k.in_features:
            expected = f"shape (B, L, D) = ({batch}, L, {self.to_k.in_features})"
            checks.fail("CrossAttention", "context", expected, tuple(context.shape))
        right = context_mask is None or (
            tuple(context_mask.shape) == tuple(context.shape[:2]) and context_mask.dtype == torch.bool
        )
        if not right:
            expected = f"a bool tensor of shape (B, L) = {tuple(context.shape[:2])}"
            checks.fail("CrossAttention", "context_mask", expected, checks.describe(context_mask))
        tokens = to_tokens(x)
        q = self.to_q(self.normed(tokens)).flatten(1, 2)
        y = self.attend(q, self.to_k(context), self.to_v(context), context_mask)
        return x + from_tokens(y.unflatten(1, tokens.shape[1:3]), *x.shape[3:])
