"""The races of `fastvdiff verify`: a kernel against what would run without it, once for each class of calls."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table

from fastvdiff import dispatch, ops, verified
from fastvdiff.race import race
from fastvdiff.reference.conv3d import moments

from .examples import Arguments, Draw

SIZES = {
    64: (2, 64, 16, 128, 128),
    320: (2, 320, 16, 64, 64),
    1280: (2, 1280, 16, 16, 16),
}  # channels -> (B, C, T, H, W)
_KERNELS = ((1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3))
_DTYPES = {"bfloat16": torch.bfloat16, "tf32": torch.float32}
_NORM_GROUPS = 32
_SECONDS = 0.05
_MARGIN = 0.97  # of the other's time: less is won


@dataclass(frozen=True)
class Contest:
    """One call of `op`: `otherwise` computes the same without the op's own kernel."""

    op: str
    otherwise: Callable[..., Any]
    kernel: tuple[int, int, int]
    channels: int
    channels_last: bool
    numbers: str  # of _DTYPES
    sums: bool
    training: bool

    @property
    def row(self) -> tuple[str, ...]:
        """What the table's rows go by; its columns go by `sums` and `training`."""
        layout = "channels_last" if self.channels_last else "contiguous"
        return (self.op, "x".join(map(str, self.kernel)), str(self.channels), layout, self.numbers)

    def make(self, device: str) -> Arguments:
        """The call's arguments."""
        draw = Draw(_DTYPES[self.numbers], device)
        shape, channels = SIZES[self.channels], self.channels
        deviation = (channels * self.kernel[0] * self.kernel[1] * self.kernel[2]) ** -0.5
        x = draw(*shape, channels_last=self.channels_last)
        convolution = (draw(channels, channels, *self.kernel, std=deviation), draw(channels))
        named: dict[str, Any] = {"padding": "same"}
        if self.sums:
            named |= {"channel_bias": draw(shape[0], channels),
                      "residual": draw(*shape, channels_last=self.channels_last)}  # fmt: skip
        if self.op == "conv3d":
            return (x, *convolution), named
        named["stats"] = moments(x.detach(), _NORM_GROUPS).float()
        return (x, _NORM_GROUPS, draw(channels), draw(channels), *convolution), named

    def takes(self, impl: str, device: str) -> bool:
        """Whether `impl` runs the call when it is asked for by name."""
        args, named = self.make(device)
        try:
            with _as_fast_as_torch_goes(), torch.set_grad_enabled(self.training):
                getattr(ops, self.op)(*args, **named, impl=impl)
        except NotImplementedError:
            return False
        return True

    def call(self, run: Callable[..., Any], args: Any, named: dict[str, Any]) -> Callable[[], None]:
        """A timed run: the forward, or with the gradients of everything."""
        leaves = [t for t in (*args, *named.values()) if isinstance(t, torch.Tensor) and t.requires_grad]

        def timed() -> None:
            with torch.set_grad_enabled(self.training):
                y = run(*args, **named)
                if self.training:
                    torch.autograd.grad(y, leaves, y.detach())

        return timed


@dataclass(frozen=True)
class Outcome:
    """How a contest went for the implementation `impl`, in its class of calls."""

    contest: Contest
    impl: str
    which: str
    milliseconds: tuple[float, float]  # what would run otherwise, the kernel

    @property
    def won(self) -> bool:
        """Whether the kernel was faster by more than the noise."""
        otherwise, kernel = self.milliseconds
        return kernel < _MARGIN * otherwise


def _pair(
    x: torch.Tensor, num_groups: int, norm_weight: torch.Tensor, norm_bias: torch.Tensor, *convolution: torch.Tensor,
    stats: torch.Tensor, **named: Any,
) -> torch.Tensor:  # fmt: skip
    """norm_silu_conv3d as the two ops, each by whatever runs it here."""
    return ops.conv3d(ops.group_norm_silu(x, num_groups, norm_weight, norm_bias, stats=stats), *convolution, **named)


_OTHERWISE = {"conv3d": partial(ops.conv3d, impl="reference"), "norm_silu_conv3d": _pair}


def contests(op: str) -> Iterator[Contest]:
    """One for each class of calls in which `op` is raced."""
    both = (False, True)
    for choices in itertools.product(_KERNELS, SIZES, (True, False), _DTYPES, both, both):
        yield Contest(op, _OTHERWISE[op], *choices)


def raced(passed: set[str]) -> dict[str, list[str]]:
    """Op -> its implementations among `passed` that run by themselves only where they have won a race."""
    impls = {
        op: [i.name for i in impls if i.raced is not None and f"{op}.{i.name}" in passed]
        for op, impls in dispatch.ops().items()
    }
    return {op: names for op, names in impls.items() if names}


def run(contest: Contest, impl: str, device: str) -> Outcome:
    """Race one implementation, the other side at its best."""
    args, named = contest.make(device)
    kernel = partial(getattr(ops, contest.op), impl=impl)
    with _as_fast_as_torch_goes():
        with torch.set_grad_enabled(contest.training):
            (walk, *_) = dispatch.trace(kernel, *args, **named)
        (found,) = (i for i in dispatch.ops()[contest.op] if i.name == impl)
        times = race(
            contest.call(contest.otherwise, args, named), contest.call(kernel, args, named), _SECONDS
        )  # fmt: skip
    return Outcome(contest, impl, found.raced(walk.facts), times)


@contextlib.contextmanager
def _as_fast_as_torch_goes() -> Iterator[None]:
    """cuDNN picks its fastest algorithm, and float32 convolutions may use tf32."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.conv.fp32_precision
    cudnn.benchmark, cudnn.conv.fp32_precision = True, "tf32"
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.conv.fp32_precision = before


def won(outcomes: list[Outcome]) -> list[str]:
    """The races that were won, as the record names them."""
    return [verified.won(f"{o.contest.op}.{o.impl}", o.which) for o in outcomes if o.won]


def table(outcomes: list[Outcome]) -> Table:
    """How many times as fast each kernel was in each class."""
    shown = Table(title="times as fast as without the kernel; it runs by itself in the classes marked *")
    for column in ("op", "kernel", "channels", "layout", "numbers", "impl"):
        shown.add_column(column)
    for column in ("forward", "with sums", "training", "with sums"):
        shown.add_column(column, justify="right")
    for row, group in itertools.groupby(outcomes, key=lambda o: (*o.contest.row, o.impl)):
        cells = {(o.contest.training, o.contest.sums): o for o in group}
        shown.add_row(*row, *(_cell(cells[key]) for key in itertools.product((False, True), repeat=2)))
    return shown


def _cell(outcome: Outcome) -> str:
    otherwise, kernel = outcome.milliseconds
    return f"{otherwise / kernel:.2f}x{'*' if outcome.won else ''}"
