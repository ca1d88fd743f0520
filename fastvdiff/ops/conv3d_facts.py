"""What decides which implementation of a convolution runs: facts of a call, and what each one takes or is slow at."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd import forward_ad

from fastvdiff import dispatch
from fastvdiff.reference.conv3d import FAST_ON_CPU, are_channels_last, triple

from . import registration

_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
RACED_KERNELS = ("1x1x1", "1x3x3", "3x1x1", "3x3x3")
# On an H100 the same kernel is 1.2 times as fast as cuDNN with 320 channels, and 0.9 times with 1280.
_WIDTHS = ((480, "480 channels and more"), (192, "192 to 479 channels"), (32, "32 to 191 channels"))


def options_of(
    batch: int, weight: torch.Tensor, stride: Any, dilation: Any, groups: int, out_sizes: tuple[int, int, int],
    sums: bool, repeats: bool = False, prefix: bool = False, statistics: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What the implementations look at beside the facts of every call.

    `sums`: it adds more than a bias; `repeats`: a padding_mode is "replicate"; `prefix`: frames come in front;
    `statistics`: the result's are asked for.
    """
    return {
        "groups": groups, "out_sizes": out_sizes, "positions": batch * math.prod(out_sizes), "weight": weight.shape,
        "weight_strides": weight.stride(), "steps": (stride, dilation), "sums": sums, "repeats": repeats,
        "prefix": prefix, "statistics": statistics,
    }  # fmt: skip


def size_keeping(x: torch.Tensor, weight: torch.Tensor, sums: bool, **options: Any) -> dispatch.Facts:
    """Facts of a convolution that keeps T, H and W of an x of the weight's channels."""
    shape = (x.shape[0], weight.shape[1], *x.shape[2:])
    options |= options_of(shape[0], weight, 1, 1, 1, shape[2:], sums)
    recorded = dispatch.needs_grad(x, weight)
    return dispatch.Facts(x.device.type, registration.autocast_dtype(x), shape, x.stride(), recorded, options)


def _plain_steps(facts: dispatch.Facts) -> bool:
    return all(triple(step) == (1, 1, 1) for step in facts.options["steps"])


def _channels_last(facts: dispatch.Facts) -> bool:
    """Whether the result is channels_last_3d."""
    options = facts.options
    return are_channels_last(facts.shape, facts.strides) or are_channels_last(
        options["weight"], options["weight_strides"]
    )


def race_class(facts: dispatch.Facts) -> str:
    """The convolutions with which a call wins or loses against cuDNN; those of "others" are never raced."""
    weight = facts.options["weight"]
    kernel, channels = "x".join(map(str, weight[2:])), min(facts.shape[1], weight[0])
    if not _plain_steps(facts) or channels < 32 or kernel not in RACED_KERNELS:
        return "others"
    return ", ".join((
        kernel, next(words for least, words in _WIDTHS if channels >= least),
        "channels_last" if _channels_last(facts) else "contiguous",
        "float32 as tf32" if facts.dtype == torch.float32 else "16 bits",
        "with sums" if facts.options["sums"] else "no sums", "training" if facts.needs_grad else "forward",
    ))  # fmt: skip


def on_cpu_winograd(facts: dispatch.Facts) -> str | None:
    """What minimal filtering asks of a convolution."""
    reason = registration.on_cpu(facts)
    if reason is not None:
        return reason
    options, kernel = facts.options, tuple(facts.options["weight"][2:])
    if options["groups"] != 1:
        return f"no grouped convolution, got groups = {options['groups']}"
    if kernel[1:] != (3, 3) and kernel != (3, 1, 1):
        return f"kernels of (k, 3, 3) and (3, 1, 1), got {kernel}"
    if not _plain_steps(facts):
        return "stride and dilation of 1"
    if options["prefix"]:
        return "no prefix"
    if options["repeats"] and facts.needs_grad:
        return "no gradient with padding_mode 'replicate'"
    return None


def slower_than_direct(facts: dispatch.Facts) -> str | None:
    """The classes in which minimal filtering lost against oneDNN on x86 with AVX2 or AVX-512, forward or training.

    torch's transforms have no rule for it.
    """
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        return "left to torch under vmap and forward-mode differentiation"
    weight, (frames, height, width) = facts.options["weight"], facts.options["out_sizes"]
    fewest, pairs = min(facts.shape[1], weight[0]), facts.shape[1] * weight[0]
    if facts.dtype.itemsize == 2 and facts.dtype in FAST_ON_CPU:
        return f"slower here: oneDNN multiplies {facts.dtype} by instructions of its own"
    if weight[3] == 1:
        if fewest < 48 or pairs * facts.options["positions"] < 600_000:
            return "slower here: 3x1x1 with fewer than 48 channels, or on a small tensor"
        asked, made = frames, -(-frames // 4) * 4
    else:
        least = 24 if _AVX512 and _channels_last(facts) else 16
        if fewest < least:
            return f"slower here: fewer than {least} channels"
        tiles = -(-height // 4) * -(-width // 4)
        if facts.shape[0] * frames * tiles < 8 and pairs > 2048:
            return "slower here: the weight is large beside a tensor of fewer than 8 tiles"
        asked, made = height * width, tiles * 16
    return f"slower here: of its tiles' {made} outputs {asked} are asked for" if asked < 0.65 * made else None


def on_cuda(facts: dispatch.Facts) -> str | None:
    """What the CUDA kernels ask of a convolution."""
    reason = registration.on_cuda(facts)
    if reason is not None:
        return reason
    if facts.options["groups"] != 1:
        return f"no grouped convolution, got groups = {facts.options['groups']}"
    if facts.options["positions"] >= 2**31:
        return f"fewer than 2^31 output positions, got {facts.options['positions']}"
    if facts.dtype != torch.float32:
        return None
    # Dynamo cannot trace the setting, which may differ from one run of the compiled code to the next.
    if torch.compiler.is_compiling():
        return "float32 is multiplied as tf32, and under torch.compile it is not known whether torch allows that"
    allowed = torch.backends.cudnn.conv.fp32_precision
    if allowed != "tf32":
        return f"float32 is multiplied as tf32, which torch.backends.cudnn.conv.fp32_precision = {allowed!r} forbids"
    return None


def left_to_portable(facts: dispatch.Facts) -> str | None:
    """Calls that impl="cuda_sm90" hands on to the kernels of "cuda", slower than cuDNN on a device of its own kind."""
    for what, asked in (("statistics", "statistics"), ("padding_mode 'replicate'", "repeats"), ("a prefix", "prefix")):
        if facts.options[asked]:
            return f"slower here: {what} would leave it to the kernels of 'cuda'"
    return None


def on_hopper(facts: dispatch.Facts) -> str | None:
    """What the kernel of tensor copies and warpgroup products asks for."""
    reason = registration.on_sm90a(facts)
    if reason is not None:
        return reason
    if facts.dtype == torch.float32:
        return "takes bfloat16 and float16, not float32"
    if facts.shape[1] % 8 or facts.strides[1] != 1:
        return f"x is not channels_last with a multiple of 8 channels, got {facts.shape[1]}"
    return on_cuda(facts)
