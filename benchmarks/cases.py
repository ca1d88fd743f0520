"""What is measured: every case with its eager expression, its fastvdiff call and its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import eager, targets
from fastvdiff import ops

CHANNELS_LAST = torch.channels_last_3d
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op at one size.

    `tensors(generator)` draws float32 leaves; `eager(*tensors)` and `fast(*tensors)` compute the same. With
    `training` the timed call is forward and backward. `layouts` are the memory formats of the 5-D tensors.
    """

    op: str
    label: str
    tensors: Callable[[torch.Generator], Tensors]
    eager: Callable[..., Any]
    fast: Callable[..., Any]
    training: bool = False
    channels_last: bool = False
    compiled: bool = True

    @property
    def target(self) -> float | None:
        """How many times as fast as the eager expression it is to be."""
        return targets.against_eager("cpu", self.op, self.name)

    @property
    def name(self) -> str:
        """A readable test id."""
        parts = [self.op, self.label, "channels_last" if self.channels_last else "contiguous"]
        return " ".join([*parts, "training" if self.training else "forward"]).replace(" ", "-")


def _normal(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], Tensors]:
    def draw(generator: torch.Generator) -> Tensors:
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    return draw


def _both(formats: tuple[bool, ...] = (False, True), **named: Any) -> list[Case]:
    """Forward and training, in each memory format."""
    return [
        Case(**named, channels_last=channels_last, training=training, compiled=not training)
        for channels_last in formats
        for training in (False, True)
    ]


def _group_norm_silu() -> list[Case]:
    cases = []
    for b, c, t, h, w in ((1, 64, 16, 32, 32), (1, 128, 16, 16, 16)):
        size, x = f"{b}x{c}x{t}x{h}x{w}", (b, c, t, h, w)
        cases += _both(
            op="group_norm_silu", label=size, tensors=_normal(x, (c,), (c,)),
            eager=lambda x, weight, bias: eager.group_norm_silu(x, 8, weight, bias),
            fast=lambda x, weight, bias: ops.group_norm_silu(x, 8, weight, bias),
        )  # fmt: skip
        cases += _both(
            op="group_norm_silu", label=f"{size} scale shift",
            tensors=_normal(x, (c,), (c,), (b, c), (b, c)),
            eager=lambda x, weight, bias, scale, shift: eager.group_norm_silu(x, 8, weight, bias, scale, shift),
            fast=lambda x, weight, bias, scale, shift: ops.group_norm_silu(
                x, 8, weight, bias, scale=scale, shift=shift
            ),
        )  # fmt: skip
    return cases


def frames_first(t: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, heads*D, T, H, W) as the op takes it, (B, T, S, heads, D): a view in either memory format."""
    return t.flatten(3).unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 2)


def _temporal_attention() -> list[Case]:
    def fast(heads: int) -> Callable[..., Any]:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            views = (frames_first(t, heads) for t in (q, k, v))
            y = ops.temporal_attention(*views, attn_bias=bias)
            return y.permute(0, 3, 4, 1, 2).flatten(1, 2).unflatten(3, q.shape[3:])

        return call

    cases = []
    for c, t, h, w, heads in ((128, 16, 32, 32, 4), (320, 25, 16, 16, 5)):
        x = (1, c, t, h, w)
        cases += _both(
            op="temporal_attention", label=f"1x{c}x{t}x{h}x{w} heads {heads}", tensors=_normal(x, x, x),
            eager=partial(eager.temporal_attention, heads=heads), fast=fast(heads),
        )  # fmt: skip
    x = (1, 128, 16, 32, 32)
    cases += _both(
        (False,), op="temporal_attention", label="1x128x16x32x32 heads 4 bias",
        tensors=_normal(x, x, x, (4, 16, 16)), eager=partial(eager.temporal_attention, heads=4), fast=fast(4),
    )  # fmt: skip
    return cases


def _temporal_attention_block() -> list[Case]:
    cases = []
    for c, t, s, heads, inner in ((64, 16, 32, 8, 256), (128, 16, 16, 8, 256)):

        def tensors(generator: torch.Generator, c: int = c, t: int = t, s: int = s, inner: int = inner) -> Tensors:
            draw = [torch.randn(1, c, t, s, s, generator=generator)]
            draw += [torch.randn(inner, c, generator=generator) * c**-0.5 for _ in range(3)]
            draw += [torch.randn(c, inner, generator=generator) * inner**-0.5]
            return (*draw, *(torch.randn(c, generator=generator) for _ in range(3)))

        def fast(
            x: Any, q: Any, k: Any, v: Any, out: Any, out_bias: Any, weight: Any, bias: Any, heads: int = heads
        ) -> Any:
            named = {"out_bias": out_bias, "norm_weight": weight, "norm_bias": bias}
            return ops.temporal_attention_block(x, q, k, v, out, heads=heads, **named)

        cases += _both(
            op="temporal_attention_block", label=f"1x{c}x{t}x{s}x{s} heads {heads}x32", tensors=tensors,
            eager=partial(eager.temporal_attention_block, heads=heads), fast=fast,
        )  # fmt: skip
    return cases


def _conv3d() -> list[Case]:
    cases = []
    for kernel in ((1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3)):
        x, weight = (1, 64, 16, 32, 32), (64, 64, *kernel)
        cases += [
            Case(
                "conv3d", f"64x16x32x32 kernel {'x'.join(map(str, kernel))}", _normal(x, weight, (64,)), eager.conv3d,
                lambda x, weight, bias: ops.conv3d(x, weight, bias, padding="same"),
                training=training, channels_last=channels_last, compiled=False,
            )
            for channels_last in (False, True)
            for training in (False, True)
        ]  # fmt: skip
    x = (1, 128, 16, 16, 16)
    cases.append(
        Case(
            "conv3d", "128x16x16x16 kernel 1x3x3 channel bias residual",
            _normal(x, (128, 128, 1, 3, 3), (128,), (1, 128), x), eager.resnet_tail,
            lambda x, weight, bias, channel_bias, residual: ops.conv3d(
                x, weight, bias, padding="same", channel_bias=channel_bias, residual=residual
            ),
            channels_last=True, compiled=False,
        )
    )  # fmt: skip
    cases += _both(
        op="norm_silu_conv3d", label="128x16x16x16 kernel 1x3x3",
        tensors=_normal(x, (128,), (128,), (128, 128, 1, 3, 3), (128,)),
        eager=lambda x, gamma, beta, weight, bias: eager.norm_silu_conv3d(x, 8, gamma, beta, weight, bias),
        fast=lambda x, gamma, beta, weight, bias: ops.norm_silu_conv3d(
            x, 8, gamma, beta, weight, bias, padding="same"
        ),
    )  # fmt: skip
    return cases


def _geglu() -> list[Case]:
    """Of a feed-forward layer of 320 channels in one clip of 8 frames at 32 x 32."""
    return _both(
        (False,), op="geglu", label="8192x320", tensors=_normal((8, 1024, 2 * 4 * 320)), eager=eager.geglu,
        fast=ops.geglu,
    )  # fmt: skip


def _ddim_step() -> list[Case]:
    x = (2, 4, 16, 128, 128)
    return [
        Case(
            "ddim_step", "2M elements guidance clip", _normal(x, x, x),
            lambda x, c, u: eager.ddim_step(x, c, u, 0.5, 0.6, 7.5, 1.0),
            lambda x, c, u: ops.ddim_step(x, c, 0.5, 0.6, uncond_output=u, guidance_scale=7.5, clip_sample=1.0),
        )
    ]  # fmt: skip


CASES = (
    *_group_norm_silu(), *_temporal_attention(), *_temporal_attention_block(), *_conv3d(), *_geglu(), *_ddim_step(),
)  # fmt: skip
