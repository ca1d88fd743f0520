"""conv3d on the kernels for 9.0: how they cut calls, on a model that walks the pixels as the copies do.

The kernels themselves are compiled and inspected (tests/native/test_cuda_objects.py), and run on a GPU only
(tests/kernels/test_conv3d_gpu.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastvdiff import dispatch, verified
from fastvdiff.native import conv3d_cuda as native
from fastvdiff.native import conv3d_cuda_sm90
from fastvdiff.ops import conv3d, registration
from fastvdiff.ops.conv3d_facts import race_class
from tests.closeness import hold

from .conv3d_library import Library, shim
from .test_conv3d_op import clip, draw


class Copies(Library):
    """The shim, and in place of the kernel for 9.0 what its tensor map and its taps' offsets come to."""

    def __init__(self) -> None:
        super().__init__("ordinary", descending=False)
        self.taken = 0

    def cuda_conv3d_sm90_cluster_forward(self, *arguments: Any) -> bool:
        return self.cuda_conv3d_sm90_forward(*arguments)

    def cuda_conv3d_sm90_forward(
        self, addresses: tuple[int, ...], strides: tuple[int, ...], numbers: tuple[int, ...], multiprocessors: int,
        stream: int,
    ) -> bool:  # fmt: skip
        t = {name: self.tensors.get(at) for name, at in zip(native._POINTERS, addresses, strict=True)}
        _, channels, out_channels, *rest = numbers
        size, out_size, kernel, stride, dilation, before, replicate = (rest[i : i + 3] for i in range(0, 21, 3))
        groups, frames = rest[21:23]
        if t["prefix"] is not None or t["prologue"] is not None or groups or any(replicate):
            return False
        if channels % 8 or out_channels % 8 or t["x"].dtype == torch.float32 or t["y"].stride(1) != 1:
            return False
        # From the box's lower corner to its upper one, in steps: what the map says, and the count that follows.
        upper = [(o - 1) * s + 1 - n - b for o, s, n, b in zip(out_size, stride, size, before, strict=True)]
        starts = [range(-b, n + u, s) for b, n, u, s in zip(before, size, upper, stride, strict=True)]
        assert [len(walk) for walk in starts] == list(out_size)
        y = torch.zeros(t["y"].shape)
        for tap in range(math.prod(kernel)):
            at = tap // (kernel[1] * kernel[2]), tap // kernel[2] % kernel[1], tap % kernel[2]
            pixels = t["x"].float()
            for d in range(3):
                pixels = _pixels(pixels, d + 2, [p + at[d] * dilation[d] for p in starts[d]])
            y += torch.einsum("bcthw,kc->bkthw", pixels, t["weight"].float()[:, at[0], at[1], at[2]])
        if t["bias"] is not None:
            y += t["bias"].view(1, -1, 1, 1, 1)
        if t["channel_bias"] is not None:
            y += t["channel_bias"].view(*y.shape[:2], frames, 1, 1)
        t["y"].copy_(y if t["residual"] is None else y + t["residual"].float())
        self.taken += 1
        return True


def _pixels(x: torch.Tensor, dim: int, coordinates: list[int]) -> torch.Tensor:
    """x at these coordinates, zeros outside."""
    inside = torch.tensor([0 <= c < x.shape[dim] for c in coordinates])
    at = torch.tensor(coordinates).clamp(0, x.shape[dim] - 1)
    return x.index_select(dim, at) * inside.view([-1 if d == dim else 1 for d in range(5)])


@pytest.fixture
def copies() -> Iterator[Copies]:
    replacement = Copies()
    with shim(replacement=replacement), pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv3d_cuda_sm90, "multiprocessors", lambda x: 1)
        patch.setattr(registration, "on_sm90a", lambda facts: None)
        yield replacement


@pytest.mark.parametrize("impl", ["cuda_sm90", "cuda_sm90_cluster"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "options", "taken"),  # of a call with a backward
    [
        ((3, 3, 3), {"padding": "same"}, 2),
        ((1, 3, 3), {"padding": (0, 1, 1)}, 2),
        ((3, 1, 1), {"padding": (2, 0, 0, 0, 0, 0)}, 2),
        ((3, 3, 3), {"padding": (1, 0, 2, 1, 0, 2), "dilation": (1, 2, 2)}, 2),
        ((2, 3, 2), {"padding": 1, "stride": (2, 1, 2)}, 1),  # the strided gradient is the portable kernel's
        ((1, 1, 1), {"padding": 1}, 1),  # padding beyond the kernel has no transposed call
        ((3, 3, 3), {"padding": 1, "padding_mode": "replicate"}, 0),
    ],
    ids=str,
)
def test_against_float64(
    copies: Copies, kernel: tuple[int, ...], options: dict[str, Any], taken: int, dtype: torch.dtype, impl: str
) -> None:
    x, weight = clip(2, 16, 4, 6, 7, dtype=dtype), draw(24, 16, *kernel, dtype=dtype)
    with torch.no_grad():
        frames = conv3d(x, weight, impl="reference", **options).shape[2]
    y = hold(conv3d, x, weight, draw(24), channel_bias=draw(2, 24, frames), impl=impl, dtype=dtype,
             baseline=lambda *a, **k: conv3d(*a, **k, impl="reference"), **options)  # fmt: skip
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert copies.taken == taken


def test_residual_and_statistics(copies: Copies) -> None:
    x, weight, residual = clip(1, 8, 2, 4, 5), draw(16, 8, 1, 3, 3), clip(1, 16, 2, 4, 5)
    options: dict[str, Any] = {"padding": "same", "impl": "cuda_sm90", "dtype": torch.bfloat16,
                               "baseline": lambda *a, **k: conv3d(*a, **k, impl="reference")}  # fmt: skip
    hold(conv3d, x, weight, channel_bias=draw(1, 16), residual=residual, **options)
    assert copies.taken == 2
    hold(conv3d, x, weight, residual=residual, stats_groups=4, **options)
    assert copies.taken == 3  # the gradient alone


def test_runs_by_itself_where_it_has_won(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead of the portable kernel; what it would hand on to that one it leaves alone."""
    x, weight = clip(1, 32, 2, 4, 5), draw(32, 32, 1, 3, 3)

    def chosen(**options: Any) -> dispatch.Walk:
        with torch.no_grad():
            return dispatch.trace(conv3d, x, weight, padding="same", **options)[0]

    which = race_class(chosen().facts)
    record = {"conv3d.cuda", "conv3d.cuda_sm90", verified.won("conv3d.cuda_sm90", which)}
    monkeypatch.setattr(dispatch, "_FOUND", {"cpu": frozenset(record)})
    assert chosen().chosen == "cuda_sm90"
    assert "statistics" in chosen(stats_groups=4).reasons["cuda_sm90"]
    assert "replicate" in chosen(padding_mode="replicate").reasons["cuda_sm90"]
    monkeypatch.setattr(dispatch, "_FOUND", {"cpu": frozenset({*record, verified.won("conv3d.cuda", which)})})
    assert chosen().chosen == "cuda_sm90"
    assert chosen(stats_groups=4).chosen == "cuda"
    assert chosen().reasons["cuda_sm90_cluster"] == "no device has run it yet: it runs where it is named"


def test_what_is_refused(copies: Copies) -> None:
    weight = draw(8, 8, 1, 3, 3)
    for x, reason in (
        (clip(1, 8, 2, 4, 5, dtype=torch.float32), "not float32"),
        (draw(1, 8, 2, 4, 5), "not channels_last"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            conv3d(x, weight, impl="cuda_sm90")
    with pytest.raises(NotImplementedError, match="multiple of 8 channels, got 4"):
        conv3d(clip(1, 4, 2, 4, 5), draw(8, 4, 1, 3, 3), impl="cuda_sm90")
