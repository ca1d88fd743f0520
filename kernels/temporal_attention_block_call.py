"""The arguments that the temporal attention block's forward and backward kernels share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from . import launch

# q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, out_weight, out_bias, norm_weight, norm_bias, frame_embedding,
# attn_bias: the order of the registered op.
Parameters = Sequence[torch.Tensor | None]

_NORMS = {None: 0, "layer_norm": 1, "rms_norm": 2}
_LEAST = 16  # of each side of a dot


class Call:
    """One call's tensors and constants.

    rows is x as (B, T, S, C); parameters are read in their own dtype; tables are mask, cos, sin; strides are the rows'
    strides of the four weights; constants are the kernels' constexprs that no configuration changes, and parts the two
    powers of two that hold the channels of the result. A plain call has no mask, tables, embedding or biases.
    """

    def __init__(
        self, x: torch.Tensor, parameters: Parameters, heads: int, norm: str | None, mask: torch.Tensor | None,
        cos: torch.Tensor | None, sin: torch.Tensor | None, rotary_style: str, is_causal: bool, residual: bool,
    ) -> None:  # fmt: skip
        self.rows = rows_of(x)
        self.batch, frames, self.positions, channels = self.rows.shape
        self.parameters = [p if p is None or _dense_rows(p) else p.contiguous() for p in parameters]
        self.tables = [None if t is None else t.contiguous() for t in (mask, cos, sin)]
        self.strides = [self.parameters[i].stride(0) for i in (0, 1, 2, 6)]
        self.plain = all(t is None for t in (*self.parameters[3:6], *self.parameters[10:], *self.tables))
        dim = parameters[0].shape[0] // heads
        self.item_bytes, self.architecture = x.element_size(), _architecture()
        # Rows of a tile with more than 128 channels: what sums in registers leave room for, less without wgmma.
        self.wide_rows = 32 if self.item_bytes == 4 or 0 < self.architecture < 90 else 64
        padded = max(_LEAST, triton.next_power_of_2(frames))
        if padded == 32 and channels > 128 and self.wide_rows == 64:
            padded = 64  # one unit of two positions: of two units, the eight warps of 64 rows would compute each twice
        self.constants = {
            "T": frames, "C": channels, "D": dim, "HEADS": heads, "NORM": _NORMS[norm],
            "MASK_ROWS": 0 if mask is None else 1 if mask.dim() == 2 else frames,
            "PAIRS": 0 if cos is None else cos.shape[1], "HALF": rotary_style == "half", "IS_CAUSAL": is_causal,
            "RESIDUAL": residual, "PRECISION": launch.dot_precision(x.dtype), "TP": padded,
            "PER_UNIT": padded // frames,
            "DP": max(_LEAST, triton.next_power_of_2(dim)),
        }  # fmt: skip
        self.parts = dict(zip(("C0", "C1"), _parts(channels), strict=True))
        layout = "channels_last" if self.rows.stride(3) == 1 else "contiguous"
        self.shape_class = f"t{padded}-c{channels}-h{heads}-d{dim}-{self.item_bytes}byte-{layout}"

    def tiles(self, units: int) -> tuple[int, int]:
        """Positions, and tiles of `units` units that cover those of one batch entry."""
        return self.positions, triton.cdiv(self.positions, units * self.constants["PER_UNIT"])


def rows_of(t: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) as (B, T, S, C): a view where H and W have a common stride."""
    return t.movedim(1, -1).flatten(2, 3)


def written_back(t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """t holding what was written to `rows`, which is a copy where t's strides allowed no view."""
    if rows.data_ptr() != t.data_ptr():
        t.copy_(rows.unflatten(2, t.shape[3:]).movedim(-1, 1))
    return t


def _parts(channels: int) -> tuple[int, int]:
    """Powers of two, the first the larger, that together hold the channels: 320 is 256 and 64, not 512."""
    whole = max(_LEAST, triton.next_power_of_2(channels))
    if whole in (channels, _LEAST):
        return whole, 0
    rest = max(_LEAST, triton.next_power_of_2(channels - whole // 2))
    return (whole, 0) if rest == whole // 2 else (whole // 2, rest)


def _dense_rows(p: torch.Tensor) -> bool:
    return p.is_contiguous() or (p.dim() == 2 and p.stride(1) == 1)


def _architecture() -> int:
    """The CUDA device's compute capability as a number (90 for sm_90); 0 where there is none."""
    if launch.INTERPRETED:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0
