"""Attention over the frames at each position (Ho et al. 2022, arXiv:2204.03458, section 3)."""

import torch
import torch.nn.functional as F

from .precision import accumulation_dtype


def temporal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_bias: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_style: str = "interleaved",
    k_offset: int = 0,
    scale: float | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """softmax(scale * rot(q) rot(k)^T + bias, forbidden keys at -inf) v, over Tk at each position and head.

    q (B, T, S, heads, D); k, v (B, Tk, S, heads, D); attn_bias (heads, T, Tk); attn_mask (B, Tk) or (B, T, Tk), True
    where a query may attend; rotary (cos, sin), each (L, R/2). A query with no key allowed gives 0. The result has the
    strides of `torch.empty_like(q)`.
    """
    plain = attn_bias is None and attn_mask is None and rotary is None
    # SDPA holds sums and softmax in fp32 by itself: only what is added around it needs the wider dtype.
    wide = q.dtype if plain else accumulation_dtype(q.dtype)
    queries, keys, values = q.to(wide), k.to(wide), v.to(wide)
    if rotary is not None:
        cos, sin = (table.to(wide) for table in rotary)
        queries = rotate(queries, cos[: q.shape[1]], sin[: q.shape[1]], rotary_style)
        here = slice(k_offset, k_offset + k.shape[1])
        keys = rotate(keys, cos[here], sin[here], rotary_style)
    if attn_mask is None:
        batched = [x.permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (queries, keys, values)]
    else:
        batched = [x.permute(0, 2, 3, 1, 4) for x in (queries, keys, values)]
    added = None if plain else _added(q, k, attn_bias, attn_mask, is_causal, wide)
    causal = is_causal and added is None
    y = F.scaled_dot_product_attention(*batched, attn_mask=added, is_causal=causal, scale=scale)
    y = y.reshape(q.shape[0], q.shape[2], q.shape[3], q.shape[1], q.shape[4]).permute(0, 3, 1, 2, 4)
    return torch.empty_like(q).copy_(y)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34) of the first R dimensions of x.

    x (B, T, S, heads, D); cos, sin (T, R/2). Dimension 2i turns with 2i + 1 ("interleaved") or i with i + R/2 ("half").
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None, None], sin[:, None, None]
    if style == "interleaved":
        a, b = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, x[..., 2 * half :]), dim=-1)


def _added(
    q: torch.Tensor,
    k: torch.Tensor,
    attn_bias: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    wide: torch.dtype,
) -> torch.Tensor | None:
    """What is added to the scores: (1, heads, T, Tk), or (B, 1, heads or 1, T, Tk) with a mask; None for nothing."""
    frames, keys = q.shape[1], k.shape[1]
    allowed = None if attn_mask is None else attn_mask.reshape(q.shape[0], 1, 1, -1, keys)
    if is_causal:
        causal = torch.ones(frames, keys, dtype=torch.bool, device=q.device).tril()
        allowed = causal if allowed is None else allowed & causal
    if attn_bias is None:
        return allowed
    bias = attn_bias.to(wide)[None]
    return bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
