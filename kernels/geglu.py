"""geglu: h * gelu(gate) of the two halves of a projection in one pass over memory, and its gradient.

**Computes**
  y = h g Phi(g), (h, g) the halves of a row, Phi the normal distribution function: (1 + erf(g / sqrt 2)) / 2.
  Backward: dh = dy g Phi(g), dg = dy h (Phi(g) + g phi(g)), phi the normal density.

**Layout**
  Rows of 2 D elements, those of one row neighbours; rows any stride apart.

**Work split**
  A program owns ROWS rows of BLOCK columns of both halves, BLOCK the largest power of 2 up to 1024 that divides D, 256
  where none from 64 on does: 2048 elements, 16 a thread of each tensor; backward 1024, as 2048 with a mask took one
  register too many on sm_100. Offsets of rows in 64 bits.

**Traffic**
  2 N read and N written, N the elements of the result; backward 3 N read, 2 N written. Eager's forward reads 3 N and
  writes 2 N, and keeps gelu(g), N more; its backward reads 6 N and writes 4 N, as its halves are joined by a copy.

**Precision**
  float32, rounded once.

**Refuses**
  Nothing; under torch.compile, which writes the same pass, it stands aside (the op's `slower`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch


@triton.jit
def _halves(x_ptr, stride, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's tile: its rows and columns, their mask, and both halves in float32."""
    columns_of_tiles = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    row = (pid // columns_of_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (pid % columns_of_tiles) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < width)
    h = tl.load(x_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * stride + (width + column), mask=mask, other=0.0).to(tl.float32)
    return row, column, mask, h, gate


@triton.jit
def _normal_below(gate):
    return 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)


@triton.jit
def geglu_fwd_kernel(x_ptr, y_ptr, stride, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y of ROWS x BLOCK elements."""
    row, column, mask, h, gate = _halves(x_ptr, stride, rows, width, ROWS, BLOCK)
    y = h * (gate * _normal_below(gate))
    tl.store(y_ptr + row * width + column, launch.narrow(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def geglu_bwd_kernel(
    x_ptr, grad_ptr, dx_ptr, stride, stride_grad, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Both halves of dx, of ROWS x BLOCK elements each."""
    row, column, mask, h, gate = _halves(x_ptr, stride, rows, width, ROWS, BLOCK)
    grad = tl.load(grad_ptr + row * stride_grad + column, mask=mask, other=0.0).to(tl.float32)
    below = _normal_below(gate)
    bell = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    at = dx_ptr + row * (2 * width) + column
    tl.store(at, launch.narrow(grad * (gate * below), dx_ptr.dtype.element_ty), mask=mask)
    dgate = grad * h * (below + gate * bell)
    tl.store(at + width, launch.narrow(dgate, dx_ptr.dtype.element_ty), mask=mask)


# ---- launches -------------------------------------------------------------------------------------------------------


def _configuration(kernel: str, dtype: torch.dtype, width: int, shipped: int) -> launch.Configuration:
    """Tiles of `shipped` elements and four warps."""
    block = next((b for b in (1024, 512, 256, 128, 64) if width % b == 0), 256)

    def of(warps: int, elements: int) -> launch.Configuration:
        return {"ROWS": max(1, elements // block), "BLOCK": block, "num_warps": warps, "num_stages": 1}

    def candidates() -> list[launch.Configuration]:
        return [of(warps, elements) for warps in (4, 8) for elements in (1024, 2048, 4096)]

    return launch.configuration(kernel, f"{dtype.itemsize}byte-{block}", of(4, shipped), candidates)


def _tiles(rows: int, width: int, chosen: launch.Configuration) -> tuple[int]:
    return (-(-rows // chosen["ROWS"]) * -(-width // chosen["BLOCK"]),)


def forward(x: torch.Tensor) -> torch.Tensor:
    """(rows, D) of (rows, 2 D), whose rows may lie apart."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = x.new_empty((rows, width))
    if y.numel():
        chosen = _configuration("geglu_fwd", x.dtype, width, 2048)
        with launch.on_device(x):
            geglu_fwd_kernel[_tiles(rows, width, chosen)](x, y, x.stride(0), rows, width, **chosen)
    return y


def backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of x, contiguous."""
    dx = x.new_empty(x.shape)
    if dx.numel():
        rows, width = grad.shape
        chosen = _configuration("geglu_bwd", x.dtype, width, 1024)
        with launch.on_device(x):
            geglu_bwd_kernel[_tiles(rows, width, chosen)](
                x, grad, dx, x.stride(0), grad.stride(0), rows, width, **chosen
            )
    return dx
