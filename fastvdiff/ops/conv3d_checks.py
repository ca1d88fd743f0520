"""What `conv3d` and `norm_silu_conv3d` ask of a convolution's arguments."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch

from fastvdiff import checks
from fastvdiff.reference.conv3d import output_sizes, paddings, triple


def convolution(
    op: str, x: object, weight: object, bias: object, stride: object, padding: object, dilation: object,
    groups: object, padding_mode: object, prefix: object, channel_bias: object, residual: object, stats_groups: object,
) -> tuple[int, int, int]:  # fmt: skip
    """Every argument of a convolution, in the name of `op`; returns (T_out, H_out, W_out)."""
    checks.tensor(op, "x", x)
    checks.floating(op, "x", x)
    if x.dim() != 5:
        checks.fail(op, "x", "(B, C, T, H, W)", f"shape {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    checks.tensor(op, "weight", weight)
    if weight.dim() != 5 or 0 in weight.shape:
        checks.fail(op, "weight", "(C_out, C / groups, kT, kH, kW), none of them 0", f"shape {tuple(weight.shape)}")
    out_channels, kernel = weight.shape[0], tuple(weight.shape[2:])
    if not isinstance(groups, int) or groups < 1 or channels % groups or out_channels % groups:
        checks.fail(op, "groups", f"a divisor of C = {channels} and of C_out = {out_channels}", groups)
    expected = (out_channels, channels // groups, *kernel)
    checks.parameter(op, "weight", weight, x, "x", expected, symbols="(C_out, C / groups, kT, kH, kW)")
    checks.parameter(op, "bias", bias, x, "x", (out_channels,), symbols="(C_out,)")
    sizes = tuple(x.shape[2:])
    first_padding, out_sizes = _geometry(op, sizes, kernel, stride, padding, dilation, padding_mode)
    if prefix is not None:
        before = (batch, channels, first_padding, *sizes[1:])
        checks.parameter(op, "prefix", prefix, x, "x", before, symbols="(B, C, t0, H, W)")
    checks.parameter(op, "channel_bias", channel_bias, x, "x", (batch, out_channels),
                     (batch, out_channels, out_sizes[0]), symbols="(B, C_out) or (B, C_out, T_out)")  # fmt: skip
    checks.parameter(op, "residual", residual, x, "x", (batch, out_channels, *out_sizes),
                     symbols="(B, C_out, T_out, H_out, W_out)")  # fmt: skip
    if not isinstance(stats_groups, int) or stats_groups < 0 or (stats_groups and out_channels % stats_groups):
        checks.fail(op, "stats_groups", f"0, or a divisor of C_out = {out_channels}", stats_groups)
    return out_sizes


def _geometry(*arguments: Any) -> tuple[int, tuple[int, int, int]]:
    """`_check_geometry`, remembered between eager calls: a network asks the same question in every step."""
    if not torch.compiler.is_compiling():
        with contextlib.suppress(TypeError):  # a list is not hashable
            return _remembered_geometry(*arguments)
    return _check_geometry(*arguments)


def _check_geometry(
    op: str, sizes: tuple[int, int, int], kernel: tuple[int, int, int], stride: Any, padding: Any, dilation: Any,
    padding_mode: Any,
) -> tuple[int, tuple[int, int, int]]:  # fmt: skip
    """The front temporal padding and (T_out, H_out, W_out), from checked arguments."""
    _check_numbers(op, "stride", stride, (3,), least=1)
    _check_numbers(op, "dilation", dilation, (3,), least=1)
    modes = _check_padding(op, padding, stride, padding_mode)
    pads = paddings(padding, kernel, triple(dilation))
    for size, mode, first, last, name in zip(sizes, modes, pads[::2], pads[1::2], "THW", strict=True):
        if mode == "replicate" and size == 0 and (first or last):
            checks.fail(op, "x", f"{name} of at least 1, for padding_mode 'replicate' to repeat", 0)
    out_sizes = output_sizes(sizes, kernel, triple(stride), pads, triple(dilation))
    if min(out_sizes) < 1:
        checks.fail(op, "weight", f"a kernel that fits into the padded (T, H, W) of x = {sizes} with {pads}", kernel)
    return pads[0], out_sizes


_remembered_geometry = functools.lru_cache(maxsize=1024, typed=True)(_check_geometry)


def _check_numbers(op: str, argument: str, value: object, lengths: tuple[int, ...], least: int) -> None:
    """`value` is a whole number of at least `least`, or a sequence of them of one of the `lengths`."""
    sequence = isinstance(value, Sequence) and not isinstance(value, str)
    numbers = value if sequence else (value,)
    whole = all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and n >= least for n in numbers)
    if not whole or (sequence and len(value) not in lengths):
        allowed = " or ".join(str(n) for n in lengths)
        checks.fail(op, argument, f"a whole number >= {least}, or {allowed} of them", repr(value))


def _check_padding(op: str, padding: object, stride: object, padding_mode: object) -> tuple[str, str, str]:
    """The modes of (t, h, w)."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            checks.fail(op, "padding", "'same', 'valid', or numbers", repr(padding))
        if padding == "same" and triple(stride) != (1, 1, 1):
            checks.fail(op, "stride", "1 with padding='same'", stride)
    else:
        _check_numbers(op, "padding", padding, (3, 6), least=0)
    modes = triple(padding_mode) if isinstance(padding_mode, (str, Sequence)) else ()
    if len(modes) != 3 or any(mode not in ("zeros", "replicate") for mode in modes):
        checks.fail(op, "padding_mode", "'zeros' or 'replicate', or 3 of them", repr(padding_mode))
    return modes
