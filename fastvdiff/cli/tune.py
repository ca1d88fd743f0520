"""`fastvdiff tune`: the fastest launch configurations of the Triton kernels on the user's device, remembered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import typer
from rich.table import Table

from fastvdiff import dispatch, ops, tuning, verified

from .tables import table_console

# Level -> (batch, frames, height, width, channels, heads, head dim, heads * head dim): Stable Video Diffusion and
# AnimateDiff at their published sizes, and the original video diffusion U-Net.
LEVELS = {
    "svd-l0": (2, 25, 72, 128, 320, 5, 64),
    "svd-l1": (2, 25, 36, 64, 640, 10, 64),
    "svd-l2": (2, 25, 18, 32, 1280, 20, 64),
    "svd-l3": (2, 25, 9, 16, 1280, 20, 64),
    "animatediff-l0": (2, 16, 64, 64, 320, 8, 40),
    "animatediff-l1": (2, 16, 32, 32, 640, 8, 80),
    "animatediff-l2": (2, 16, 16, 16, 1280, 8, 160),
    "animatediff-l3": (2, 16, 8, 8, 1280, 8, 160),
    "vdm-l0": (4, 16, 64, 64, 64, 8, 32),
    "vdm-l1": (4, 16, 32, 32, 128, 8, 32),
    "vdm-l3": (4, 16, 8, 8, 512, 8, 32),
}
_Call = Callable[[], list[torch.Tensor]]
_Case = tuple[Callable[..., Any], tuple[torch.Tensor, ...]]  # a function and its arguments


def tune(levels: list[str], only: list[str], training: bool) -> None:
    """Tune every op that has a Triton kernel (or those of `only`) at these levels, and print what was found."""
    _check("--level", levels, LEVELS)
    _check("--op", only, [op for op in _CALLS if op in dispatch.ops()])
    if not torch.cuda.is_available():
        typer.echo("fastvdiff tune: needs a GPU that torch can use; this machine has none", err=True)
        raise typer.Exit(1)
    console = table_console()
    table = Table("op", "level", "kernel", "shape class", "configuration", title=verified.device_name("cuda"))
    for column in ("shipped ms", "tuned ms", "speed-up"):
        table.add_column(column, justify="right")
    with console.status("timing") as status:
        for op, level, call in _calls(levels or list(LEVELS), only or list(_CALLS), training):
            status.update(f"timing {op} at {level}")
            for t in tuning.tune(call):
                chosen = ", ".join(f"{k}={v}" for k, v in t.best.items())
                table.add_row(
                    op, level, t.kernel, t.shape_class, "as shipped" if t.best == t.shipped else chosen,
                    f"{t.shipped_ms:.3f}", f"{t.best_ms:.3f}", f"{t.shipped_ms / t.best_ms:.2f}x",
                )  # fmt: skip
    console.print(table)
    console.print(f"Kept in {tuning.tuned.path()}; times are those of the whole call, its inputs out of the L2 cache.")


def _check(option: str, asked: list[str], known: object) -> None:
    for name in asked:
        if name not in known:
            raise typer.BadParameter(f"expected one of {', '.join(known)}, got {name!r}", param_hint=option)


def _calls(levels: list[str], only: list[str], training: bool) -> Iterator[tuple[str, str, _Call]]:
    """Each op's call at each level, skipping what its Triton kernel does not support."""
    for level in levels:
        for op in only:
            function, tensors = _CALLS[op](*LEVELS[level])
            call = partial(_run, function, tensors, training)
            with contextlib.suppress(NotImplementedError):
                call()
                yield op, level, call


def _run(function: Callable[..., Any], tensors: tuple[torch.Tensor, ...], training: bool) -> list[torch.Tensor]:
    """The call's outputs, and the gradients of all its tensors where training."""
    with dispatch.use_impl("triton"), torch.set_grad_enabled(training):
        result = function(*tensors)
        outputs = list(result) if isinstance(result, tuple) else [result]
        return [*outputs, *torch.autograd.grad(outputs[0], tensors, outputs[0].detach())] if training else outputs


def _draw(*shape: int, std: float = 1.0, channels_last: bool = False) -> torch.Tensor:
    t = (torch.randn(shape, device="cuda") * std).to(torch.bfloat16)
    return (t.contiguous(memory_format=torch.channels_last_3d) if channels_last else t).requires_grad_(True)


def _group_norm_silu(b: int, t: int, h: int, w: int, c: int, *_: int) -> _Case:
    x, weight, bias = _draw(b, c, t, h, w, channels_last=True), _draw(c), _draw(c)
    return lambda x, weight, bias: ops.group_norm_silu(x, 32, weight, bias), (x, weight, bias)


def _temporal_attention(b: int, t: int, h: int, w: int, c: int, heads: int, dim: int) -> _Case:
    return ops.temporal_attention, tuple(_draw(b, t, h * w, heads, dim) for _ in range(3))


def _temporal_attention_block(b: int, t: int, h: int, w: int, c: int, heads: int, dim: int) -> _Case:
    inner = heads * dim
    weights = [_draw(inner, c, std=c**-0.5) for _ in range(3)] + [_draw(c, inner, std=inner**-0.5)]
    x = _draw(b, c, t, h, w, channels_last=True)
    return partial(ops.temporal_attention_block, heads=heads), (x, *weights)


def _geglu(b: int, t: int, h: int, w: int, c: int, *_: int) -> _Case:
    return ops.geglu, (_draw(b * t, h * w, 8 * c),)


def _ddim_step(b: int, t: int, h: int, w: int, *_: int) -> _Case:
    tensors = tuple(_draw(b, 4, t, h, w) for _ in range(3))
    guided = partial(ops.ddim_step, alpha_t=0.5, alpha_prev=0.6, guidance_scale=7.5, clip_sample=1.0)
    return lambda x, cond, uncond: guided(x, cond, uncond_output=uncond), tensors


_CALLS: dict[str, Callable[..., _Case]] = {
    "group_norm_silu": _group_norm_silu,
    "temporal_attention": _temporal_attention,
    "temporal_attention_block": _temporal_attention_block,
    "geglu": _geglu,
    "ddim_step": _ddim_step,
}
