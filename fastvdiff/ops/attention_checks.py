"""Checks of what every attention over frames takes: the scores' bias and mask, their scale, rotary positions."""

from __future__ import annotations

import math

import torch

from fastvdiff import checks

ROTARY_STYLES = ("interleaved", "half")


def scores(
    op: str, bias: object, mask: object, scale: object, like: torch.Tensor, like_name: str,
    sizes: tuple[int, int, int, int], key: str,
) -> None:  # fmt: skip
    """`bias`, `mask` and `scale` are None or fit scores of `sizes` (B, heads, T, Tk); messages spell Tk as `key`."""
    batch, heads, frames, keys = sizes
    checks.parameter(op, "attn_bias", bias, like, like_name, (heads, frames, keys), symbols=f"(heads, T, {key})")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        checks.fail(op, "scale", "a float or None", checks.describe(scale), TypeError)
    # torch's kernels take the square root of the scale, or give NaN where a negative one meets a mask.
    if scale is not None and not 0 <= scale < math.inf:
        checks.fail(op, "scale", "a finite float from 0 upward", checks.describe(scale))
    if mask is None:
        return
    checks.tensor(op, "attn_mask", mask)
    if mask.dtype != torch.bool:
        checks.fail(op, "attn_mask", "dtype torch.bool (True = attend)", mask.dtype, TypeError)
    checks.same_device(op, "attn_mask", mask, like, like_name)
    checks.shape(op, "attn_mask", mask, (batch, keys), (batch, frames, keys), symbols=f"(B, {key}) or (B, T, {key})")


def rotary(
    op: str, tables: object, style: object, like: torch.Tensor, like_name: str, rows: int, rows_name: str, dim: int
) -> None:
    """`tables` is None or a pair of (L, R/2) tensors with L >= `rows`, spelled `rows_name`, and R <= D = `dim`."""
    if style not in ROTARY_STYLES:
        checks.fail(op, "rotary_style", "'interleaved' or 'half'", checks.describe(style))
    if tables is None:
        return
    if not isinstance(tables, (tuple, list)) or len(tables) != 2:
        checks.fail(op, "rotary", "a pair (cos, sin) of (L, R/2) tensors", checks.describe(tables), TypeError)
    for name, table in zip(("rotary cos", "rotary sin"), tables, strict=True):
        checks.tensor(op, name, table)
        checks.same_device(op, name, table, like, like_name)
        if table.dtype not in (torch.float32, torch.float64):
            checks.fail(op, name, "dtype float32 or float64", table.dtype, TypeError)
        if table.dim() != 2 or table.shape[0] < rows or 2 * table.shape[1] > dim:
            expected = f"shape (L, R/2) with L >= {rows_name} = {rows} and R <= D = {dim}"
            checks.fail(op, name, expected, tuple(table.shape))
    checks.shape(op, "rotary sin", tables[1], tables[0].shape, symbols="of cos")
