"""Self-attention over the frames at each position, as one residual op."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F

from fastvdiff import ops

from .attention import Attention
from .rotary import apply_rotary


class TemporalAttention(Attention):
    """Pre-norm self-attention over the T frames at every position, plus the input, as one fused op.

    Equivalent to::

        y = norm(x.permute(0, 3, 4, 2, 1)) + frame_embedding             # (B, H, W, T, C)
        q, k, v = to_q(y), to_k(y), to_v(y)                              # q and k turned by `rotary`
        y = to_out(F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias))
        x + y.permute(0, 4, 3, 1, 2)

    Positions come from outside, so that all layers of a network share one table: `frame_embedding` from
    `FrameEmbedding`, `rotary` from `rotary_table`, `attn_bias` from `RelativePositionBias`, alone or together.

    Args:
        query_dim, heads, dim_head, dropout, bias, out_bias, norm, eps, zero_init: as in `Attention`. `dropout` acts on
            the output projection, as in diffusers.
        attention_dropout: dropout of the attention weights. Above 0 the module trains through
            `F.scaled_dot_product_attention` instead of the fused op, and warns of it once.

    Source: Ho et al., "Video Diffusion Models", arXiv:2204.03458, section 3.
    """

    def __init__(
        self,
        query_dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        out_bias: bool = True,
        *,
        norm: str | None = "layer_norm",
        eps: float = 1e-5,
        attention_dropout: float = 0.0,
        zero_init: bool = True,
    ) -> None:
        super().__init__(
            query_dim, None, heads, dim_head, dropout, bias, out_bias, norm=norm, eps=eps, zero_init=zero_init
        )
        self.norm_kind, self.eps, self.attention_dropout = norm, eps, attention_dropout
        if attention_dropout > 0:
            warnings.warn(
                "TemporalAttention: attention_dropout > 0 trains through F.scaled_dot_product_attention, slower than"
                " the fused op, which has no dropout inside; `dropout` keeps the fused op",
                stacklevel=2,
            )

    def forward(
        self,
        x: torch.Tensor,
        *,
        frame_embedding: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        attn_bias: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Attend over the frames of x.

        Args:
            x: (B, C, T, H, W).
            frame_embedding: (T, C), added after the norm.
            rotary: (cos, sin), each (T, R/2) float32, R <= dim_head.
            attn_bias: (heads, T, T), added to the scores.
            attn_mask: (B, T) or (B, T, T) bool, True where a frame may attend.
            is_causal: frame t attends to frames 0 to t only.

        Returns:
            (B, C, T, H, W).

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        self.check_video(x)
        if self.training and self.attention_dropout > 0:
            return x + self._with_attention_dropout(x, frame_embedding, rotary, attn_bias, attn_mask, is_causal)
        # A dropout between projection and residual keeps the two apart.
        residual = not (self.training and self.to_out[1].p > 0)
        y = ops.temporal_attention_block(
            x, self.to_q.weight, self.to_k.weight, self.to_v.weight, self.to_out[0].weight,
            heads=self.heads, q_bias=self.to_q.bias, k_bias=self.to_k.bias, v_bias=self.to_v.bias,
            out_bias=self.to_out[0].bias, norm=self.norm_kind,
            norm_weight=None if self.norm is None else self.norm.weight,
            norm_bias=getattr(self.norm, "bias", None), eps=self.eps, frame_embedding=frame_embedding,
            attn_bias=attn_bias, attn_mask=attn_mask, rotary=rotary, is_causal=is_causal, residual=residual,
        )  # fmt: skip
        return y if residual else x + self.to_out[1](y)

    def _with_attention_dropout(
        self,
        x: torch.Tensor,
        frame_embedding: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        attn_bias: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> torch.Tensor:
        """The branch through SDPA, which drops attention weights."""
        batch, _, frames, height, width = x.shape
        y = self.normed(x.permute(0, 3, 4, 2, 1).flatten(1, 2))
        if frame_embedding is not None:
            y = y + frame_embedding.to(y.dtype)
        y = y.flatten(0, 1)
        q, k, v = (self.split_heads(project(y)) for project in (self.to_q, self.to_k, self.to_v))
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        bias = q.new_zeros(1, frames, frames) if attn_bias is None else attn_bias.to(q.dtype)
        if is_causal:
            later = torch.ones(frames, frames, dtype=torch.bool, device=x.device).triu(1)
            bias = bias.masked_fill(later, float("-inf"))
        bias = bias.expand(batch, -1, -1, -1)
        if attn_mask is not None:
            bias = bias.masked_fill(~attn_mask.reshape(batch, 1, -1, frames), float("-inf"))
        bias = bias.repeat_interleave(height * width, dim=0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=self.attention_dropout)
        y = self.output(y.transpose(1, 2).flatten(2))
        return y.reshape(batch, height, width, frames, -1).permute(0, 4, 3, 1, 2)
