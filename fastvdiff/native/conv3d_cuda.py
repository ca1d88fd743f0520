"""conv3d's CUDA kernels (csrc/cuda/conv3d.cu)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import DTYPE_CODES, address, library, on_device, stream, wide

_Optional = torch.Tensor | None
_LAST = torch.channels_last_3d
FORWARD, _DATA_GRADIENT, _WEIGHT_GRADIENT = range(3)


class Geometry(NamedTuple):
    """What a convolution does, as the ops spell it out: triples in the order of (t, h, w)."""

    stride: tuple[int, int, int]
    padding: tuple[int, int, int, int, int, int]  # (t0, t1, h0, h1, w0, w1)
    dilation: tuple[int, int, int]
    replicate: tuple[bool, bool, bool]


class Plan(NamedTuple):
    """What a pass launches: `blocks` of tile_rows x tile_columns results, `steps` of tile_depth products in all."""

    tile_rows: int
    tile_columns: int
    tile_depth: int
    shared_bytes: int
    blocks: int
    steps: int


class Prologue(NamedTuple):
    """silu(x * factor + term) on the way in; `table` (B, T or 1, C, 2) float32, factor and term."""

    table: torch.Tensor
    silu: bool


@dataclass
class Call:
    """One call of a pass; its fields become Conv3dParams."""

    geometry: Geometry
    kernel: tuple[int, int, int]
    batch: int
    channels: int
    out_channels: int
    size: tuple[int, ...]  # (T, H, W) of x or dx
    out_size: tuple[int, ...]
    dtype: torch.dtype
    tensors: dict[str, _Optional]
    before: tuple[int, ...] = (0, 0, 0)
    groups: int = 0
    bias_frames: int = 1
    prologue_frames: int = 1
    silu: bool = False

    @property
    def numbers(self) -> tuple[int, ...]:
        """From Conv3dParams' batch on."""
        return (
            self.batch, self.channels, self.out_channels, *self.size, *self.out_size, *self.kernel,
            *self.geometry.stride, *self.geometry.dilation, *self.before, *self.geometry.replicate, self.groups,
            self.bias_frames, self.prologue_frames, self.silu, DTYPE_CODES[self.dtype],
        )  # fmt: skip

    def run(self, which: int, x: torch.Tensor) -> None:
        """Allocate the workspace and launch on the current stream of x's device."""
        lib = library()
        floats = lib.cuda_conv3d_workspace(which, self.numbers)
        if floats:
            self.tensors["workspace"] = torch.empty(floats, dtype=torch.float32, device=x.device)
        with on_device(x):
            lib.cuda_conv3d(which, *self.arguments(), stream(x))

    def arguments(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Conv3dParams' addresses, strides and numbers."""
        addresses = tuple(address(self.tensors.get(name)) for name in _POINTERS)
        inputs = (_outer_strides(self.tensors.get(name)) for name in ("x", "prefix", "grad"))
        results = (self.tensors.get("y", self.tensors.get("dx")), self.tensors.get("residual"))
        strides = tuple(n for group in (*inputs, *map(_strides, results)) for n in group)
        return addresses, strides, self.numbers


_POINTERS = (
    "x", "prefix", "weight", "bias", "channel_bias", "prologue", "residual", "y", "stats", "grad", "dx", "dweight",
    "workspace",
)  # fmt: skip


def empty(shape: tuple[int, ...], x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """A result's memory, on x's device and in its dtype."""
    memory_format = _LAST if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: _Optional, geometry: Geometry, prefix: _Optional,
    channel_bias: _Optional, residual: _Optional, stats_groups: int, out_size: tuple[int, ...], channels_last: bool,
    prologue: Prologue | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The result, in channels_last_3d if asked for, and its (B, G, 2) statistics (G = `stats_groups`, maybe 0)."""
    call, y, stats = forward_call(
        x, weight, bias, geometry, prefix, channel_bias, residual, stats_groups, out_size, channels_last, prologue
    )
    if y.numel():
        call.run(FORWARD, x)
    return y, stats


def forward_call(
    x: torch.Tensor, weight: torch.Tensor, bias: _Optional, geometry: Geometry, prefix: _Optional,
    channel_bias: _Optional, residual: _Optional, stats_groups: int, out_size: tuple[int, ...], channels_last: bool,
    prologue: Prologue | None = None, out: _Optional = None,
) -> tuple[Call, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The call that `forward` runs, its result (`out` where given) and its statistics."""
    batch, out_channels = x.shape[0], weight.shape[0]
    y = empty((batch, out_channels, *out_size), x, channels_last) if out is None else out
    stats = x.new_empty((batch, stats_groups, 2), dtype=torch.float32)
    call = _of(x, weight, geometry, out_size)
    call.tensors |= {
        "x": _rows(x), "prefix": None if prefix is None else _rows(prefix.to(x.dtype)), "weight": _packed(weight, x),
        "bias": wide(bias), "channel_bias": wide(channel_bias),
        "residual": None if residual is None else residual.to(x.dtype), "y": y,
    }  # fmt: skip
    if channel_bias is not None and channel_bias.dim() == 3:
        call.bias_frames = out_size[0]
    if stats_groups:
        call.groups, call.tensors["stats"] = stats_groups, stats
    if prologue is not None:
        call.tensors["prologue"] = prologue.table
        call.prologue_frames, call.silu = prologue.table.shape[1], prologue.silu
    return call, y, stats


def input_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, prefix: _Optional
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx, with the strides of `torch.empty_like(x)`, and the gradient of the prefix where there is one."""
    dx = torch.empty_like(x)
    front, back = [0, 0, 0], [0, 0, 0]  # of the padded clip, beyond x
    for d, repeats in enumerate(geometry.replicate):
        if repeats or (d == 0 and prefix is not None):
            front[d] = geometry.padding[2 * d]
        if repeats:
            back[d] = geometry.padding[2 * d + 1]
    padded = dx
    if any(front) or any(back):
        size = tuple(sum(n) for n in zip(x.shape[2:], front, back, strict=True))
        padded = empty((*x.shape[:2], *size), x, channels_last=True)
    if padded.numel():
        call = _of(padded, weight, geometry, tuple(grad.shape[2:]))
        call.before = tuple(p - f for p, f in zip(geometry.padding[::2], front, strict=True))
        call.geometry = geometry._replace(replicate=(False,) * 3)
        transposed = weight.to(x.dtype).permute(1, 2, 3, 4, 0).contiguous()
        call.tensors |= {"grad": _rows(grad), "weight": transposed, "dx": padded}
        call.run(_DATA_GRADIENT, x)
    if padded is dx:
        return dx, None if prefix is None else x.new_empty(prefix.shape)  # of no frames
    for d in (2, 1, 0):
        held_back = d == 0 and prefix is not None
        if not held_back or back[d]:
            padded = _folded(padded, d + 2, 0 if held_back else front[d], back[d])
    if prefix is None:
        return dx.copy_(padded), None
    return dx.copy_(padded[:, :, front[0] :]), padded[:, :, : front[0]].contiguous()


def weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, prefix: _Optional
) -> torch.Tensor:
    """The gradient of the weight, in its dtype and contiguous."""
    out_channels, channels, *kernel = weight.shape
    sums = x.new_empty((out_channels, *kernel, channels), dtype=torch.float32)
    if grad.numel() and x.numel():
        call = _of(x, weight, geometry, tuple(grad.shape[2:]))
        call.tensors |= {
            "x": _rows(x), "prefix": None if prefix is None else _rows(prefix.to(x.dtype)), "grad": _rows(grad),
            "dweight": sums,
        }  # fmt: skip
        call.run(_WEIGHT_GRADIENT, x)
    else:
        sums.zero_()
    return torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(sums.permute(0, 4, 1, 2, 3))


def plans(
    batch: int, channels: int, out_channels: int, size: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry,
    dtype: torch.dtype,
) -> dict[str, Plan]:  # fmt: skip
    """What "forward", "data_gradient" and "weight_gradient" launch; `size` is (T, H, W) of x. Needs no GPU."""
    numbers = sized_call(batch, channels, out_channels, size, kernel, geometry, dtype).numbers
    names = ("forward", "data_gradient", "weight_gradient")
    return {name: Plan(*library().cuda_conv3d_plan(which, numbers)) for which, name in enumerate(names)}


def sized_call(
    batch: int, channels: int, out_channels: int, size: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry,
    dtype: torch.dtype,
) -> Call:  # fmt: skip
    """A forward call without tensors; `size` is (T, H, W) of x."""
    x = torch.empty((batch, channels, *size), dtype=dtype, device="meta")
    weight = torch.empty((out_channels, channels, *kernel), device="meta")
    extents = (d * (k - 1) + 1 for k, d in zip(kernel, geometry.dilation, strict=True))
    sides = zip(geometry.padding[::2], geometry.padding[1::2], strict=True)
    out_size = tuple(
        (n + sum(both) - extent) // stride + 1
        for n, both, extent, stride in zip(size, sides, extents, geometry.stride, strict=True)
    )
    return _of(x, weight, geometry, out_size)


def _of(x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, out_size: tuple[int, ...]) -> Call:
    """A call on a tensor of x's sizes, without its tensors."""
    out_channels, channels, *kernel = weight.shape
    return Call(
        geometry, tuple(kernel), x.shape[0], channels, out_channels, tuple(x.shape[2:]), out_size, x.dtype, {},
        before=geometry.padding[::2],
    )  # fmt: skip


def _rows(t: torch.Tensor) -> torch.Tensor:
    """t, copied only if its channels do not lie side by side."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous(memory_format=_LAST)


def _packed(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(K, kT, kH, kW, C) in x's dtype: no copy for a channels_last_3d weight of that dtype."""
    return weight.to(x.dtype).permute(0, 2, 3, 4, 1).contiguous()


def _strides(t: _Optional) -> tuple[int, ...]:
    """Of (b, c, t, h, w); 0 for a dimension of one index, whose stride means nothing and may be odd."""
    if t is None:
        return (0,) * 5
    return tuple(stride if size > 1 else 0 for stride, size in zip(t.stride(), t.shape, strict=True))


def _outer_strides(t: _Optional) -> tuple[int, ...]:
    b, _, *thw = _strides(t)
    return (b, *thw)


def _folded(padded: torch.Tensor, dim: int, front: int, back: int) -> torch.Tensor:
    """The gradient of a clip whose edges were repeated `front` and `back` times along `dim`."""
    if not front and not back:
        return padded
    size = padded.shape[dim] - front - back
    if size == 1:
        return padded.sum(dim, keepdim=True, dtype=torch.float32).to(padded.dtype)
    inner = padded.narrow(dim, front, size).clone()
    for edge, first, length in ((0, 0, front + 1), (size - 1, front + size - 1, back + 1)):
        inner.select(dim, edge).copy_(padded.narrow(dim, first, length).sum(dim, dtype=torch.float32))
    return inner
