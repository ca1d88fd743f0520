"""The convolutions that are measured on a GPU: alone, as tf32, and with what a ResNet block has around them.

All but a few run in channels_last_3d alone, where eager takes part in the default format too: cuDNN twice in one case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import eager, traffic
from benchmarks.gpu_case import Draw, GpuCase, Tensors, passes
from benchmarks.shapes import ANIMATEDIFF, SVD, VAE, VDM, Level
from fastvdiff import ops

Triple = tuple[int, int, int]
SPACE, TIME, BOTH = (1, 3, 3), (3, 1, 1), (3, 3, 3)
_LAST = (True,)
_HEADLINES = {
    "svd-l0 kernel 1x3x3", "svd-l0 kernel 3x1x1", "svd-l0 kernel 1x3x3 epilogue", "svd-l0 kernel 1x3x3 resnet block",
}  # fmt: skip


@dataclass(frozen=True)
class Convolution:
    """Padded by half of its odd kernel; as many channels in and out as the level has, unless said."""

    level: Level
    kernel: Triple
    channels_in: int | None = None
    channels_out: int | None = None
    stride: Triple = (1, 1, 1)

    @property
    def channels(self) -> tuple[int, int]:
        """In and out."""
        return (self.channels_in or self.level.channels, self.channels_out or self.level.channels)

    @property
    def label(self) -> str:
        """The level, the kernel, and what differs from its other convolutions."""
        words = [self.level.name, "kernel", "x".join(map(str, self.kernel))]
        if self.channels_in or self.channels_out:
            words.append("{}to{}".format(*self.channels))
        if self.stride != (1, 1, 1):
            words += ["stride", "x".join(map(str, self.stride))]
        return " ".join(words)

    @property
    def groups(self) -> int:
        """Of the norms beside it: the published networks', of 8 channels where the level has few."""
        return min(32, self.level.channels // 8)

    @property
    def clip(self) -> tuple[int, ...]:
        """(B, C, T, H, W) of its input."""
        return (self.level.batch, self.channels[0], *self.level.clip[2:])

    @property
    def result_bytes(self) -> int:
        """Of y in bfloat16."""
        thw = traffic.strided(self.level.clip[2:], self.stride)
        return self.level.batch * self.channels[1] * math.prod(thw) * traffic.BF16

    def parameters(self, draw: Draw) -> Tensors:
        """Weight and bias."""
        into, out = self.channels
        weight = draw.normal(out, into, *self.kernel, scale=(into * math.prod(self.kernel)) ** -0.5)
        return weight, draw.normal(out)

    def norm(self, draw: Draw) -> Tensors:
        """A norm's weight and bias."""
        return draw.normal(self.channels[0]), draw.normal(self.channels[0])

    def work(self, training: bool, size: int = traffic.BF16) -> traffic.Work:
        """The convolution's alone."""
        return traffic.conv3d(
            self.level.batch, *self.channels, self.level.clip[2:], self.kernel, stride=self.stride, training=training,
            size=size,
        )  # fmt: skip


def plain(conv: Convolution, training: bool, channels_last: bool, tf32: bool = False) -> GpuCase:
    """With its bias, and nothing else around it."""
    padding = tuple(k // 2 for k in conv.kernel)

    def tensors(draw: Draw) -> Tensors:
        return (draw.normal(*conv.clip), *conv.parameters(draw))

    def fast(x: Any, weight: Any, bias: Any, *, impl: str) -> torch.Tensor:
        return ops.conv3d(x, weight, bias, conv.stride, padding, impl=impl)

    return GpuCase(
        "conv3d", f"{conv.label} tf32" if tf32 else conv.label,
        conv.work(training, 2 * traffic.BF16 if tf32 else traffic.BF16), tensors,
        partial(eager.conv3d, stride=conv.stride), fast, axes=(0, None, None), out_axis=0, training=training,
        channels_last=channels_last, tf32=tf32, other_format=True,
    )  # fmt: skip


def epilogue(conv: Convolution, training: bool, channels_last: bool) -> GpuCase:
    """The second convolution of a residual block: bias, the time embedding's channel bias, and the residual."""
    alone = plain(conv, training, channels_last)

    def tensors(draw: Draw) -> Tensors:
        level = conv.level
        return (*alone.tensors(draw), draw.normal(level.batch, level.channels), draw.normal(*level.clip))

    def fast(x: Any, weight: Any, bias: Any, channel_bias: Any, residual: Any, *, impl: str) -> torch.Tensor:
        around = {"channel_bias": channel_bias, "residual": residual}
        return ops.conv3d(x, weight, bias, padding="same", **around, impl=impl)

    return replace(
        alone, label=f"{conv.label} epilogue", tensors=tensors, eager=eager.resnet_tail, fast=fast,
        work=traffic.with_epilogue(alone.work, conv.result_bytes, training=training), axes=(*alone.axes, 0, 0),
        compile_mode=_compiled(training),
    )  # fmt: skip


def statistics(conv: Convolution, training: bool, channels_last: bool) -> GpuCase:
    """With the statistics of its result; `before_norm` checks them, by what they are for."""

    def fast(x: Any, weight: Any, bias: Any, *, impl: str) -> Any:
        return ops.conv3d(x, weight, bias, padding="same", stats_groups=conv.groups, impl=impl)

    return replace(
        plain(conv, training, channels_last), label=f"{conv.label} stats", fast=fast,
        eager=partial(eager.conv3d_moments, groups=conv.groups), compile_mode=_compiled(training),
    )  # fmt: skip


def before_norm(conv: Convolution, training: bool, channels_last: bool) -> GpuCase:
    """A convolution, then norm and SiLU, which know their statistics from it and read its result once."""
    alone, width = plain(conv, training, channels_last), conv.level.channels // conv.groups

    def tensors(draw: Draw) -> Tensors:
        return (*alone.tensors(draw), *conv.norm(draw))

    def baseline(x: Any, weight: Any, bias: Any, norm_weight: Any, norm_bias: Any) -> torch.Tensor:
        return eager.conv3d_norm_silu(x, weight, bias, weight.shape[0] // width, norm_weight, norm_bias)

    def fast(x: Any, weight: Any, bias: Any, norm_weight: Any, norm_bias: Any, *, impl: str) -> torch.Tensor:
        y, stats = ops.conv3d(x, weight, bias, padding="same", stats_groups=conv.groups, impl=impl)
        norm = None if impl == "reference" else "cuda"  # there is no "cuda_sm90" that is given statistics
        return ops.group_norm_silu(y, conv.groups, norm_weight, norm_bias, stats=stats, impl=norm)

    return replace(
        alone, label=f"{conv.label} stats norm", tensors=tensors, eager=baseline, fast=fast,
        work=traffic.then_norm(alone.work, conv.result_bytes, training=training), axes=(0, *[None] * 4),
        compile_mode=_compiled(training),
    )  # fmt: skip


def after_norm(conv: Convolution, training: bool, channels_last: bool) -> GpuCase:
    """Norm and SiLU on the way in, by statistics that the convolution before has left."""
    alone = plain(conv, training, channels_last)

    def tensors(draw: Draw) -> Tensors:
        x, *parameters = alone.tensors(draw)
        return (x, *conv.norm(draw), *parameters, eager.moments(x, conv.groups))

    def baseline(x: Any, norm_weight: Any, norm_bias: Any, weight: Any, bias: Any, stats: Any) -> torch.Tensor:
        return eager.norm_silu_conv3d(x, conv.groups, norm_weight, norm_bias, weight, bias)

    def fast(
        x: Any, norm_weight: Any, norm_bias: Any, weight: Any, bias: Any, stats: Any, *, impl: str
    ) -> torch.Tensor:
        return ops.norm_silu_conv3d(
            x, conv.groups, norm_weight, norm_bias, weight, bias, stats=stats, padding="same", impl=impl
        )

    return replace(
        alone, op="norm_silu_conv3d", tensors=tensors, eager=baseline, fast=fast,
        work=traffic.norm_before(alone.work, math.prod(conv.clip) * traffic.BF16, training=training),
        axes=(0, *[None] * 4, 0), differentiable=5, compile_mode=_compiled(training),
    )  # fmt: skip


def resnet_block(conv: Convolution, training: bool, channels_last: bool) -> GpuCase:
    """What a residual block really has: a norm, SiLU and a biased convolution twice, channel bias, and residual."""
    level, groups = conv.level, conv.groups

    def tensors(draw: Draw) -> Tensors:
        x = draw.normal(*level.clip)
        first, last = ((*conv.norm(draw), *conv.parameters(draw)) for _ in range(2))
        return (x, *first, draw.normal(level.batch, level.channels), *last, eager.moments(x, groups))

    def baseline(x: Any, *rest: Any) -> torch.Tensor:
        return eager.resnet_block(x, groups, rest[:4], rest[4], rest[5:9])

    def fast(x: Any, *rest: Any, impl: str) -> torch.Tensor:
        channel_bias, stats = rest[4], rest[9]
        h, of_h = ops.norm_silu_conv3d(
            x, groups, *rest[:4], stats=stats, padding="same", channel_bias=channel_bias, stats_groups=groups, impl=impl
        )
        return ops.norm_silu_conv3d(h, groups, *rest[5:9], stats=of_h, padding="same", residual=x, impl=impl)

    return GpuCase(
        "norm_silu_conv3d", f"{conv.label} resnet block",
        traffic.resnet_block(level.batch, level.channels, level.clip[2:], conv.kernel, training=training), tensors,
        baseline, fast, axes=(0, *[None] * 4, 0, *[None] * 4, 0), out_axis=0, differentiable=10, training=training,
        channels_last=channels_last, compile_mode=_compiled(training), other_format=True,
    )  # fmt: skip


def _compiled(training: bool) -> str | None:
    return None if training else "default"


LEVELS = tuple(Convolution(level, kernel) for level in (*SVD, *ANIMATEDIFF, *VDM) for kernel in (SPACE, TIME))
VOLUMES = tuple(Convolution(level, BOTH) for level in VAE)
TF32 = (Convolution(SVD[0], SPACE), Convolution(SVD[1], TIME), Convolution(VAE[1], BOTH))
# A network's first and last convolutions, on 3 and 4 channels, and those that make clips smaller.
ENDS = (
    Convolution(SVD[0], SPACE, channels_in=4), Convolution(SVD[0], SPACE, channels_out=4),
    Convolution(VDM[0], (1, 7, 7), channels_in=3), Convolution(VDM[0], SPACE, channels_out=3),
    Convolution(VAE[0], BOTH, channels_in=3), Convolution(VAE[0], BOTH, channels_out=3),
)  # fmt: skip
STRIDED = (
    Convolution(SVD[0], SPACE, stride=(1, 2, 2)), Convolution(ANIMATEDIFF[1], SPACE, stride=(1, 2, 2)),
    Convolution(VAE[0], BOTH, stride=(2, 2, 2)),
)  # fmt: skip


def _alone() -> Iterator[GpuCase]:
    for conv in (*LEVELS, *VOLUMES, *ENDS, *STRIDED):
        both = conv in LEVELS and conv.level in (SVD[0], VDM[0])
        yield from passes(partial(plain, conv), (False, True) if both else _LAST)
    for conv in TF32:
        yield from passes(partial(plain, conv, tf32=True), _LAST)


def _surrounded() -> Iterator[GpuCase]:
    for level in (SVD[0], SVD[1], ANIMATEDIFF[0], VDM[0]):
        for kernel in (SPACE, TIME):
            yield from passes(partial(epilogue, Convolution(level, kernel)), _LAST)
    for make, levels in (
        (statistics, (SVD[0], VDM[0])),
        (before_norm, (SVD[0], SVD[1], VDM[0])),
        (after_norm, (SVD[0], SVD[1], ANIMATEDIFF[0], VDM[0])),
        (resnet_block, (SVD[0], ANIMATEDIFF[0], VDM[0])),
    ):
        for level in levels:
            yield from _around(make, Convolution(level, SPACE))
    for make in (after_norm, resnet_block):
        yield from _around(make, Convolution(VAE[1], BOTH))


def _around(make: Callable[..., GpuCase], conv: Convolution) -> list[GpuCase]:
    """Statistics alone have no gradient of their own: that backward is the convolution's."""
    return [make(conv, training, True) for training in (False, True) if not (training and make is statistics)]


def cases() -> list[GpuCase]:
    """All of them."""
    made = (*_alone(), *_surrounded())
    return [replace(case, headline=case.channels_last and case.label in _HEADLINES) for case in made]
