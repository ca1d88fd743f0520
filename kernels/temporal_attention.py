"""Attention over the frames at each position and head, on views of the caller's own layout.

**Computes**: y[t] = sum_c softmax_c(scale * rot(q[t]) . rot(k[c]) + bias[head, t, c]) v[c], forbidden keys at -inf;
    from its gradient dy: dv = p^T dy, ds = p * (dy v^T - rowsum(p * dy v^T)), dq = rot^T(scale ds rot(k)),
    dk = rot^T(scale ds^T rot(q)), dbias = ds summed over positions and samples.
**Layout**: q (B, T, S, heads, D), k and v (B, Tk, S, heads, D) of any strides; results like torch.empty_like. A
    sequence is one (sample, position, head); neighbours in memory run side by side, heads first where columns are
    contiguous (channels_last), positions first where they are (contiguous video).
**Work split**: up to 64 frames a program owns GROUP whole sequences padded to 16, 32 or 64 rows, a warp or more each,
    in batched dots (temporal_attention_short.py). Several sequences in one dot under a block-diagonal mask would
    multiply the zeros between them with another sequence's NaN, and fill no better: 2 * 25 of 64 rows, 25 of 32. Past
    64 frames a program owns ROWS queries (or KEYS keys) and walks the others (temporal_attention_long.py).
**Traffic**: forward 4 tensors, each once: 4 * B*T*S*heads*D elements. Backward up to 64 frames 7, nothing saved but
    the inputs and no workspace; past that 5 (dq, and 8 bytes of statistics a row) and 6 (dk, dv), what neighbouring
    blocks share coming from L2. The bias' gradient adds slots * heads * T * Tk float32, written and read once.
**Precision**: scores, softmax and sums in float32. Rotated rows, and the scores' gradient for dq, enter their dots as
    high + low narrow halves. float32 inputs take three tf32 products for one, or one where torch allows tf32.
**Refuses**: above this file: T or Tk past 256, D past 160, float64.

No atomics: the bias' gradient is summed in a fixed order. On sm_90 in bfloat16, forward and backward, registers a
thread and warps a multiprocessor: 25 frames of D 64 96 and 198, 20 and 10; 16 frames of D 40 54 and 86, 36 and 23; of
D 160 96 and 194, 20 and 10; all without spills, in 16-byte reads and writes. Spills remain in float32 past 16 frames
with D past 80, and on sm_80 past 32 frames with D past 80.

On an H100, channels_last: 25 frames of D 64 at 91 % of a copy's rate forward, 93 % backward, 2.3 and 2.7 times the
fastest of torch's backends; 16 frames of D 40 at 76 and 60 %. Contiguous positions: 31 and 24 to 34 %. There a program
holds 131 kB of shared memory, through which 16-bit values are turned one by one from columns of positions into rows of
a dot, and no other program fits beside it: 43 cycles an instruction, DRAM at 28 %. What should help: fragments of a dot
straight from 8 positions of two neighbouring columns, in registers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from . import launch
from .temporal_attention_long import (
    temporal_attention_long_bwd_bias_kernel,
    temporal_attention_long_bwd_keys_kernel,
    temporal_attention_long_bwd_rows_kernel,
    temporal_attention_long_fwd_kernel,
)
from .temporal_attention_short import temporal_attention_bwd_kernel, temporal_attention_fwd_kernel
from .temporal_attention_tile import Rotary, Sizes, Terms, View

_Optional = torch.Tensor | None
_LONGEST_TILE = 64


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: _Optional, mask: _Optional, cos: _Optional,
    sin: _Optional, interleaved: bool, k_offset: int, scale: float, is_causal: bool,
) -> torch.Tensor:  # fmt: skip
    """The result, with the strides of `torch.empty_like(q)`; 0 where there are no keys."""
    y = torch.empty_like(q)
    if not y.numel():
        return y
    if not k.numel():
        return y.zero_()
    call = _Call(q, k, v, bias, mask, cos, sin, interleaved, k_offset, scale, is_causal, others=(y,))
    with launch.on_device(q):
        call.forward(y)
    return y


def backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: _Optional, mask: _Optional,
    cos: _Optional, sin: _Optional, interleaved: bool, k_offset: int, scale: float, is_causal: bool, bias_grad: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v and the bias (an empty tensor unless `bias_grad`), each in its own dtype."""
    dq, dk, dv = grads = [torch.empty_like(x) for x in (q, k, v)]
    wanted = bias is not None and bias_grad
    if q.numel() and k.numel():
        call = _Call(q, k, v, bias, mask, cos, sin, interleaved, k_offset, scale, is_causal, others=(grad, *grads))
        with launch.on_device(q):
            partial = call.backward(grad, dq, dk, dv, wanted)
        dbias = partial.sum(0).to(bias.dtype) if wanted else q.new_empty(0)
    else:
        for x in grads:
            x.zero_()
        dbias = torch.zeros_like(bias, memory_format=torch.contiguous_format) if wanted else q.new_empty(0)
    return dq, dk, dv, dbias


class _Call:
    """One call: its tensors as the kernels take them, and the launches."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: _Optional, mask: _Optional, cos: _Optional,
        sin: _Optional, interleaved: bool, k_offset: int, scale: float, is_causal: bool,
        others: Iterable[torch.Tensor],
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.batch, self.frames, self.positions, self.heads, self.dim = q.shape
        self.keys = k.shape[1]
        strides = q.stride()
        self.wide = q.dtype == torch.float32
        # Neighbouring sequences are neighbours in memory.
        self.heads_inner = self.positions == 1 or (self.heads > 1 and strides[3] <= strides[2])
        if q.stride(4) == 1:
            self.layout = "columns"
        else:
            self.layout = "positions" if strides[2] == 1 else "scattered"
        self.turned = cos is not None and cos.shape[1] > 0
        self.rotary = Rotary(View(cos, cos.stride()), View(sin, sin.stride()), k_offset) if self.turned else None
        self.terms = Terms(
            None if bias is None else View(bias, bias.stride()),
            None if mask is None else _mask_view(mask),
        )
        tensors = (q, k, v, *others)
        statistics = 2 * self.batch * self.positions * self.heads * self.frames
        widths = _parts(self.dim)
        self.constants = {
            "D": self.dim,
            "STARTS": tuple(sum(widths[:i]) for i in range(len(widths))),
            "WIDTHS": widths,
            "PAIRS": cos.shape[1] if self.turned else 0,
            "HALF": self.turned and not interleaved,
            "CAUSAL": is_causal,
            "PRECISION": _precision(q.dtype),
            "ALIGN": _alignment(tensors),
            "INDEX": tl.int64 if max(statistics, *map(_reach, tensors)) >= 2**31 else tl.int32,
        }

    def forward(self, y: torch.Tensor) -> None:
        """Writes y."""
        views = [self._view(x, self.heads_inner) for x in (self.q, self.k, self.v, y)]
        if self._short():
            kernel, used = temporal_attention_fwd_kernel, self._tiles("temporal_attention_fwd")
        else:
            kernel, used = temporal_attention_long_fwd_kernel, self._blocks("temporal_attention_long_fwd")
        sequences = self.batch * self.positions * self.heads
        grid = (triton.cdiv(sequences, used["GROUP"]) * used.get("ROW_BLOCKS", 1),)
        kernel[grid](
            *views, self.rotary, self.terms, self._sizes(self.heads_inner), self.scale,
            HEADS_INNER=self.heads_inner, **self.constants, **used,
        )  # fmt: skip

    def backward(
        self, grad: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, bias_grad: bool
    ) -> _Optional:
        """Writes dq, dk and dv; returns the bias' gradient in parts (slots, heads, T, Tk) if `bias_grad`."""
        if self._short():
            return self._backward_short(grad, dq, dk, dv, bias_grad)
        return self._backward_long(grad, dq, dk, dv, bias_grad)

    def _backward_short(
        self, grad: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, bias_grad: bool
    ) -> _Optional:
        used = self._tiles("temporal_attention_bwd")
        heads_inner = self.heads_inner and not bias_grad
        views = [self._view(x, heads_inner) for x in (grad, self.q, self.k, self.v, dq, dk, dv)]
        steps, slots, partial = 1, triton.cdiv(self.batch * self.positions * self.heads, used["GROUP"]), None
        if bias_grad:
            steps, slots, partial = self._slots(used["GROUP"], self.heads)
        temporal_attention_bwd_kernel[(slots * (self.heads if bias_grad else 1),)](
            *views, partial, self.rotary, self.terms, self._sizes(heads_inner, one_head=bias_grad), self.scale,
            self.heads, HEADS_INNER=heads_inner, STEPS=steps, **self.constants, **used,
        )  # fmt: skip
        return partial

    def _backward_long(
        self, grad: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, bias_grad: bool
    ) -> _Optional:
        memory = torch.empty(
            (self.batch, self.positions, self.heads, self.frames, 2), dtype=torch.float32, device=grad.device
        )
        statistics = memory.permute(0, 3, 1, 2, 4)
        rest = (self.rotary, self.terms, self._sizes(self.heads_inner), self.scale)
        sequences = self.batch * self.positions * self.heads

        def views(*tensors: torch.Tensor) -> list[View]:
            return [self._view(x, self.heads_inner) for x in tensors]

        used = self._blocks("temporal_attention_long_bwd_rows")
        temporal_attention_long_bwd_rows_kernel[(triton.cdiv(sequences, used["GROUP"]) * used["ROW_BLOCKS"],)](
            *views(grad, self.q, self.k, self.v, dq, statistics), *rest, HEADS_INNER=self.heads_inner,
            **self.constants, **used,
        )  # fmt: skip
        used = self._blocks("temporal_attention_long_bwd_keys")
        temporal_attention_long_bwd_keys_kernel[(triton.cdiv(sequences, used["GROUP"]) * used["KEY_BLOCKS"],)](
            *views(grad, self.q, self.k, self.v, dk, dv, statistics), *rest, HEADS_INNER=self.heads_inner,
            **self.constants, **used,
        )  # fmt: skip
        if not bias_grad:
            return None
        used = self._blocks("temporal_attention_long_bwd_bias")
        blocks = used["ROW_BLOCKS"] * used["KEY_BLOCKS"]
        steps, slots, partial = self._slots(used["GROUP"], self.heads * blocks)
        inputs = [self._view(x, False) for x in (grad, self.q, self.k, self.v)]
        temporal_attention_long_bwd_bias_kernel[(slots * self.heads * blocks,)](
            *inputs, partial, self._view(statistics, False), self.rotary, self.terms,
            self._sizes(False, one_head=True), self.scale, self.heads, HEADS_INNER=False, STEPS=steps,
            **self.constants, **used,
        )  # fmt: skip
        return partial

    def _short(self) -> bool:
        """Whether whole sequences fit a tile without spills; before sm_90 operands of a dot are held in registers."""
        halvings = (self.layout == "positions") + self.wide + (0 < launch.architecture() < 90)
        return max(self.frames, self.keys) <= max(_LONGEST_TILE >> halvings, 16)

    def _sizes(self, heads_inner: bool, one_head: bool = False) -> Sizes:
        heads = 1 if one_head else self.heads
        outer, inner = (self.positions, heads) if heads_inner else (heads, self.positions)
        return Sizes(self.batch * outer * inner, outer, inner, self.frames, self.keys)

    def _view(self, x: torch.Tensor, heads_inner: bool) -> View:
        batch, frame, position, head, column = x.stride()
        outer, inner = (position, head) if heads_inner else (head, position)
        return View(x, (batch, outer, inner, frame, column))

    def _slots(self, group: int, programs_each: int) -> tuple[int, int, torch.Tensor]:
        """Steps of a program, slots of programs, and the memory of the bias' gradient in parts.

        Enough programs to fill the device some times; steps are a power of two, so that few kernels are compiled.
        """
        groups = triton.cdiv(self.batch * self.positions, group)
        wanted = 8 * launch.multiprocessors(self.q)
        steps = triton.next_power_of_2(triton.cdiv(groups * programs_each, wanted))
        slots = triton.cdiv(groups, steps)
        sizes = (slots, self.heads, self.frames, self.keys)
        return steps, slots, torch.empty(sizes, dtype=torch.float32, device=self.q.device)

    def _tiles(self, kernel: str) -> launch.Configuration:
        rows, keys = (max(16, triton.next_power_of_2(n)) for n in (self.frames, self.keys))
        shapes = _tile_shapes(kernel, max(rows, keys), self.dim, self.layout, self.wide, self.turned)
        used = self._configuration(kernel, f"t{rows}x{keys}", ("GROUP", "num_warps"), shapes, num_stages=1)
        return {"ROWS": rows, "KEYS": keys, **used}

    def _blocks(self, kernel: str) -> launch.Configuration:
        shapes = _block_shapes(kernel, self.dim, self.layout, self.wide, self.turned)
        used = self._configuration(kernel, "blocks", ("ROWS", "KEYS", "GROUP", "num_warps", "num_stages"), shapes)
        return {
            "ROW_BLOCKS": triton.cdiv(self.frames, used["ROWS"]),
            "KEY_BLOCKS": triton.cdiv(self.keys, used["KEYS"]),
            **used,
        }

    def _configuration(
        self, kernel: str, tile: str, names: tuple[str, ...], shapes: list[tuple[int, ...]], **fixed: int
    ) -> launch.Configuration:
        """The first of `shapes`, or what was tuned instead."""
        shape_class = f"{tile}-d{self.dim}-{self.q.element_size()}byte-{self.layout}{'-turned' if self.turned else ''}"
        shipped, *others = ({**dict(zip(names, shape, strict=True)), **fixed} for shape in dict.fromkeys(shapes))
        return launch.configuration(kernel, shape_class, shipped, lambda: [shipped, *others])


def _tile_shapes(kernel: str, frames: int, dim: int, layout: str, wide: bool, turned: bool) -> list[tuple[int, int]]:
    """(GROUP, num_warps) of whole sequences padded to `frames`, the shipped one first.

    Chosen by registers (no spills) and by bytes in flight: 12 warps and more of a multiprocessor with 2 to 16 KiB each.
    Where columns are neighbours a group shares lines of memory between heads; where positions are, 16 of them fill a
    32-byte sector: on an H100 the backward of 25 frames takes 2.5 ms with 16 and 3.3 with 8.
    """
    backward = kernel.endswith("bwd")
    if layout == "positions":
        if launch.architecture() >= 90 and not wide and dim <= 64 and frames <= (16 if turned else 32):
            shipped = (16, 16 if backward and frames == 32 else 8)
        elif frames == 32 or turned or (backward and dim > 80):  # of which more would not fit into shared memory
            shipped = (8, 8) if backward else (16, 8 if turned else 16)
        else:
            shipped = (16, 8 if wide else 16)
        return [shipped, (16, 8), (16, 16), (8, 8), (32, 16), (4, 4)]
    if frames == 16:
        if wide:
            shipped = (1, 2)
        elif backward and not turned:
            shipped = (1, 1) if dim <= 64 else (2, 2)
        else:
            shipped = (2, 2) if turned and not backward else (4, 4)
    elif frames == 32 and not wide:
        shipped = (1, 4) if turned and backward else (2, 2)
    else:
        shipped = (1, 8) if turned or (wide and backward) else (1, 4)
    return [shipped, (1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (4, 4), (8, 8)]


def _block_shapes(kernel: str, dim: int, layout: str, wide: bool, turned: bool) -> list[tuple[int, int, int, int, int]]:
    """(ROWS, KEYS, GROUP, num_warps, num_stages) of blocks, the shipped one first."""
    if layout == "positions":
        shipped = (16, 16, 16, 8 if dim <= 80 and not wide else 16, 1)
        return [shipped, (16, 16, 16, 8, 1), (16, 16, 16, 16, 1), (16, 32, 16, 16, 1), (32, 32, 8, 8, 1)]
    if 0 < launch.architecture() < 90 and dim <= 80:
        shipped = (32, 64, 1, 8, 1) if kernel.endswith("_keys") else (32, 32, 1, 4, 1)
        shipped = (16, 32, 1, 4, 1) if kernel.endswith("_bias") else shipped
    elif 0 < launch.architecture() < 90:
        shipped = (16, 16, 4, 4, 1)
    elif wide:
        shipped = (32, 32, 1, 4, 1)
    elif kernel.endswith("_keys"):
        shipped = (64, 64, 1, 8 if turned or dim > 80 else 4, 1)
    else:
        shipped = (64, 64 if kernel.endswith("_fwd") and dim <= 80 else 32, 1, 4, 1)
    return [shipped, (64, 32, 1, 4, 1), (64, 64, 1, 4, 1), (64, 64, 1, 4, 2), (64, 64, 1, 8, 1), (128, 64, 1, 8, 2)]


def _mask_view(mask: torch.Tensor) -> View:
    """The mask's bytes (B, T, Tk); one row of it for all queries has stride 0."""
    batch, *row, key = mask.stride()
    return View(mask.view(torch.uint8), (batch, row[0] if row else 0, key))


def _parts(dim: int) -> tuple[int, ...]:
    """Powers of two from 16 upward, largest first, that hold `dim` columns: one, or two where that pads less."""
    whole = max(16, triton.next_power_of_2(dim))
    first = max(16, whole // 2)
    rest = max(16, triton.next_power_of_2(max(dim - first, 1)))
    return (first, rest) if first + rest < whole else (whole,)


def _precision(dtype: torch.dtype) -> str:
    """float32 where torch wants all of it takes three tf32 products, as torch's own attention does on such GPUs."""
    precision = launch.dot_precision(dtype)
    split = dtype == torch.float32 and precision == "ieee" and torch.version.hip is None
    return "tf32x3" if split else precision


def _alignment(tensors: Iterable[torch.Tensor]) -> int:
    """Elements, up to 16 bytes, of which every stride over rows is a multiple."""
    strides = (s for x in tensors for s, n in zip(x.stride()[:4], x.shape[:4], strict=True) if n > 1)
    return math.gcd(16 // next(iter(tensors)).element_size(), *strides)


def _reach(x: torch.Tensor) -> int:
    """The farthest element from the first, in elements."""
    return sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
