"""Where the temporal attention block's backward leaves its rows and sums for the parameters' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .temporal_attention_block_call import Call, Parameters

WORKSPACE_BYTES = 256 * 2**20
_PROJECTIONS = ("q_weight", "k_weight", "v_weight")
_COLUMNS = ("q_bias", "k_bias", "v_bias", "out_bias", "norm_weight", "norm_bias")
_BY_FRAME = ("frame_embedding", "attn_bias")
_NAMES = (*_PROJECTIONS, "q_bias", "k_bias", "v_bias", "out_weight", "out_bias", "norm_weight", "norm_bias",
          *_BY_FRAME)  # fmt: skip


class Workspace:
    """At most `WORKSPACE_BYTES` (one tile at least) for the rows of some tiles at a time, and the gradients so far.

    Rows, in x's dtype: h and the gradients of q, k, v (their product is a projection's gradient), o and dy (the output
    weight's); tiles' sums, in float32: bias and norm columns, frame_embedding, attn_bias. What is unwanted has no
    place; the projections' rows are all there where `whole` asks for them.
    """

    def __init__(
        self, x: torch.Tensor, parameters: Parameters, wanted: Sequence[bool], call: Call, units: int, tiles: int,
        whole: bool,
    ) -> None:  # fmt: skip
        self._wanted = {name: p for name, p, want in zip(_NAMES, parameters, wanted, strict=True) if want}
        self._rows, self._per_unit = units * call.constants["TP"], call.constants["PER_UNIT"]
        self._channels, self._inner = call.constants["C"], call.constants["D"] * call.constants["HEADS"]
        self._projections = [n for n in _PROJECTIONS if whole or n in self._wanted]
        self._column_names = [n for n in _COLUMNS if n in self._wanted]
        self._widths = [self._wanted[n].numel() for n in self._column_names]
        by_frame = [n for n in _BY_FRAME if n in self._wanted]
        weights, out = any(n in self._wanted for n in _PROJECTIONS), "out_weight" in self._wanted
        width = self._inner * (len(self._projections) + out) + self._channels * (weights + out + whole)
        sums = sum(self._widths) + self._per_unit * sum(self._wanted[n].numel() for n in by_frame)
        self.tiles = min(tiles, max(1, WORKSPACE_BYTES // max(1, self._rows * width * x.element_size() + 4 * sums)))

        def rows(columns: int, needed: bool) -> torch.Tensor | None:
            return x.new_empty(self.tiles * self._rows, columns) if needed else None

        self._h = rows(self._channels, weights)
        self._projected = rows(self._inner * len(self._projections), bool(self._projections))
        self._o, self._dy = rows(self._inner, out), rows(self._channels, out)
        self._columns = x.new_empty(self.tiles, sum(self._widths), dtype=torch.float32) if self._widths else None
        self._by_frame = {
            n: x.new_empty(self.tiles * self._per_unit, self._wanted[n].numel(), dtype=torch.float32) for n in by_frame
        }
        self._totals: dict[str, torch.Tensor] = {}
        self.strides = (self._inner * len(self._projections), sum(self._widths))
        parts = dict(self._by_frame)
        if self._projected is not None:
            parts |= dict(zip(self._projections, self._projected.split(self._inner, 1), strict=True))
        if self._columns is not None:
            parts |= dict(zip(self._column_names, self._columns.split(self._widths, 1), strict=True))
        self.rows = (self._h, *(parts.get(n) for n in _PROJECTIONS), self._o, self._dy)
        self.sums = tuple(parts.get(n) for n in (*_COLUMNS, *_BY_FRAME))

    def through_projections(self, tiles: int, weights: torch.Tensor) -> torch.Tensor:
        """dh (tiles' rows, C) of the gradients of q, k, v times the three weights (3*heads*D, C)."""
        return torch.mm(self._projected[: tiles * self._rows], weights)

    def add(self, tiles: int) -> None:
        """Add what the kernels left for the first `tiles` tiles."""
        rows = tiles * self._rows
        if self._h is not None:
            self._add("projections", _product(self._projected[:rows], self._h[:rows]))
        if self._o is not None:
            self._add("out_weight", _product(self._dy[:rows], self._o[:rows]))
        if self._columns is not None:
            self._add("columns", self._columns[:tiles].sum(0))
        for name, values in self._by_frame.items():
            self._add(name, values[: tiles * self._per_unit].sum(0))

    def gradients(self, x: torch.Tensor, parameters: Parameters) -> list[torch.Tensor]:
        """One per parameter, in its shape and dtype; empty where unwanted."""
        found = dict(self._totals)
        if "projections" in found:
            found |= dict(zip(self._projections, found["projections"].split(self._inner), strict=True))
        if "columns" in found:
            found |= dict(zip(self._column_names, found["columns"].split(self._widths), strict=True))
        return [
            found[name].reshape(p.shape).to(p.dtype, copy=True) if name in self._wanted else x.new_empty(0)
            for name, p in zip(_NAMES, parameters, strict=True)
        ]

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._totals[name] = self._totals[name].add_(value) if name in self._totals else value


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a^T b in float32."""
    if a.dtype != torch.float32 and a.is_cuda and torch.version.hip is None:
        return torch.mm(a.mT, b, out_dtype=torch.float32)
    return torch.mm(a.mT.float(), b.float())
