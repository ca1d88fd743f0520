"""What a case measured on a GPU is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.traffic import Work

CHANNELS_LAST = torch.channels_last_3d
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Draw:
    """Draws a case's tensors on a device, the same ones for the same seed."""

    device: str
    generator: torch.Generator
    dtype: torch.dtype

    @classmethod
    def on(cls, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Draw:
        """From a seed."""
        return cls(device, torch.Generator(device).manual_seed(seed), dtype)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Standard normal times `scale`."""
        return scale * torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Baseline:
    """Somebody else's way to the same result; `prepare` happens before the clock starts."""

    run: Callable[..., Any]
    prepare: Callable[[Tensors], Tensors] = lambda tensors: tensors


@dataclass(frozen=True)
class GpuCase:
    """One op at one size, in bfloat16, or in float32 multiplied as tf32.

    `tensors(draw)` makes the inputs; the first `differentiable` of them get gradients when `training` (None: all).
    `eager(*tensors)` and `fast(*tensors, impl=...)` compute the same, unless eager `draws` noise of its own. `oracle`
    is what float64 is computed with (None: eager).

    For the check, `axes` names the dimension along which each tensor may be cut (None: every piece needs all of it, and
    gradients of the pieces add up), `out_axis` the output's; `grain` is the smallest piece. Without `out_axis` the call
    is checked whole.
    """

    op: str
    label: str
    work: Work
    tensors: Callable[[Draw], Tensors]
    eager: Callable[..., Any]
    fast: Callable[..., Any]
    axes: tuple[int | None, ...] = ()
    out_axis: int | None = None
    grain: int = 1
    differentiable: int | None = None
    oracle: Callable[..., Any] | None = None
    draws: bool = False
    training: bool = False
    channels_last: bool = False
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    compile_mode: str | None = None  # None: not compiled
    target_us: float | None = None  # ops' own goals, on an H200
    headline: bool = False
    tf32: bool = False
    other_format: bool = False  # eager runs in contiguous too where the case is in channels_last

    @property
    def workload(self) -> str:
        """Op, size and pass: what the roofline depends on."""
        return "-".join([self.op, *self.label.split(), "training" if self.training else "forward"])

    @property
    def name(self) -> str:
        """A readable test id."""
        layout = "channels_last" if self.channels_last else "contiguous"
        return "-".join([self.op, *self.label.split(), layout, "training" if self.training else "forward"])

    def leaves(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors as new leaves; when training, those that the case differentiates ask for gradients."""
        count = len(tensors) if self.differentiable is None else self.differentiable
        return [t.detach().requires_grad_(self.training and i < count) for i, t in enumerate(tensors)]

    def draw(self, device: str) -> Tensors:
        """The case's tensors in its memory format."""
        dtype = torch.float32 if self.tf32 else torch.bfloat16
        return self.in_format(self.tensors(Draw.on(device, dtype)), self.channels_last)

    @staticmethod
    def in_format(tensors: Tensors, channels_last: bool) -> Tensors:
        """The 5-D tensors in channels_last_3d or contiguous, everything else as it is."""
        memory_format = CHANNELS_LAST if channels_last else torch.contiguous_format
        return tuple(t.contiguous(memory_format=memory_format) if t.dim() == 5 else t for t in tensors)


def passes(make: Callable[..., GpuCase], formats: tuple[bool, ...] = (False, True)) -> list[GpuCase]:
    """`make(training, channels_last)` for forward and training in each format."""
    return [make(training, channels_last) for channels_last in formats for training in (False, True)]
