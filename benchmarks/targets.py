"""What every op and whole networks are meant to reach: each goal once, for the cases, the tables and their tests.

GPU goals are stated for an H200 (benchmarks/limits.py); elsewhere they are the same shares of the device's rates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from benchmarks.limits import DEVICES, floor
from benchmarks.traffic import Work

_H200 = DEVICES["h200"]
_FORMAT = "(contiguous|channels_last)"


@dataclass(frozen=True)
class Target:
    """A goal, and the cases whose worst decides whether it is met.

    `measure` names what is read off a case (benchmarks/target_report.py): "us", "TFLOP/s", "reached" (the share of its
    floor), "backward reached", "backward against best", "against eager", "against cuDNN", "against compiled", "memory"
    (the share of eager's peak) or "workspace" (bytes beside inputs and result). "us", "memory" and "workspace" are to
    stay at or below `value`, the others at or above it. `part` is the share of a training case's bytes that the goal
    counts as the backward's.
    """

    device: str  # "cuda" or "cpu"
    op: str
    goal: str
    measure: str
    value: float
    cases: str  # a pattern of whole names, of this op's cases
    part: float = 0.0

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.measure in ("us", "memory", "workspace")

    def covers(self, op: str, case: str) -> bool:
        """Whether the op's case of this name is measured for it."""
        return op == self.op and _pattern(self.cases).fullmatch(case) is not None


@cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text)


def _norm(size: str, us: float) -> Iterator[Target]:
    """A forward's time and the backward's share of its 5T floor (of 8T with the forward), in both formats."""
    name = f"group_norm_silu-vae-{size}-{_FORMAT}"
    yield Target("cuda", "group_norm_silu", f"{size} forward", "us", us, f"{name}-forward")
    yield Target(
        "cuda", "group_norm_silu", f"{size} backward, of its 5T", "backward reached", 0.85, f"{name}-training", 5 / 8
    )


def _attention(level: str, us: float) -> Iterator[Target]:
    """The backward's 8T are the contract's count; the kernels' card has 7T, 11T with the forward."""
    name, op = f"temporal_attention-{level}-{_FORMAT}", "temporal_attention"
    yield Target("cuda", op, f"{level} forward", "us", us, f"{name}-forward")
    yield Target("cuda", op, f"{level} backward, of 8T", "backward reached", 0.8, f"{name}-training", 8 / 11)
    yield Target(
        "cuda", op, f"{level} backward, to the best torch backend", "backward against best", 3.0, f"{name}-training"
    )


def _convolutions() -> Iterator[Target]:
    wide = "(svd-l[0-3]|animatediff-l[0-3]|vae-1x512x[0-9x]+)"  # C >= 320
    plain = rf"conv3d-(svd|animatediff|vdm|vae)-[a-z0-9]+-kernel-[0-9x]+-{_FORMAT}-forward"
    yield Target(
        "cuda", "conv3d", "bf16 at C >= 320", "TFLOP/s", 600.0,
        f"conv3d-{wide}-kernel-[0-9x]+-channels_last-(forward|training)",
    )  # fmt: skip
    yield Target("cuda", "conv3d", "cuDNN in channels_last", "against cuDNN", 0.95, plain)
    yield Target(
        "cuda", "conv3d", "cuDNN with the epilogue beside it, 1.15x to 1.3x", "against cuDNN", 1.15,
        f"conv3d-.*-epilogue-{_FORMAT}-(forward|training)",
    )  # fmt: skip
    yield Target("cuda", "conv3d", "float32 as tf32", "TFLOP/s", 250.0, f"conv3d-.*-tf32-{_FORMAT}-(forward|training)")
    yield Target(
        "cuda", "conv3d", "workspace: peak memory is inputs and result", "workspace", 0.0,
        "conv3d-(?!.*-stats-norm-).*-channels_last-forward",
    )  # fmt: skip


def _networks(device: str, op: str, what: str, names: str, forward: float, training: float) -> Iterator[Target]:
    yield Target(device, op, f"{what}: forward", "against eager", forward, f"{names}-forward")
    yield Target(device, op, f"{what}: training step", "against eager", training, f"{names}-training")
    yield Target(device, op, f"{what}: peak memory of a training step", "memory", 0.6, f"{names}-training")


def _on_gpus() -> Iterator[Target]:
    yield from _norm("1x128x20x256x256", 240.0)
    yield from _norm("1x512x8x45x80", 22.0)
    yield from _attention("svd-l0", 310.0)
    yield from _attention("animatediff-l0", 90.0)
    yield Target(
        "cuda", "temporal_attention_block", "vdm-l0 forward", "us", 80.0,
        f"temporal_attention_block-vdm-l0-{_FORMAT}-forward",
    )  # fmt: skip
    yield from _convolutions()
    yield Target("cuda", "geglu", "copy bandwidth at 320 channels", "reached", 0.88, "geglu-(svd|animatediff)-l0-.*")
    yield Target("cuda", "ddim_step", "copy bandwidth from 256 MB", "reached", 0.88, "ddim_step-256-MB-.*")
    yield from _networks("cuda", "VideoUNet", "VideoUNet", ".*", 2.0, 1.5)
    yield Target(
        "cuda", "VideoUNet", "torch.compile, max-autotune in channels_last", "against compiled", 1.3,
        "VideoUNet-vdm-.*|.*-forward",
    )  # fmt: skip
    yield from _networks("cuda", "swap_kernels", "published networks, swapped", ".*", 2.0, 1.5)


def _on_cpus() -> Iterator[Target]:
    op = "group_norm_silu"
    yield Target("cpu", op, "scale and shift, forward", "against eager", 3.0, f"{op}-.*-scale-shift-.*-forward")
    yield Target("cpu", op, "forward", "against eager", 2.0, rf"{op}-(?!.*scale-shift).*-forward")
    yield Target("cpu", op, "forward and backward", "against eager", 1.5, f"{op}-.*-training")
    op = "temporal_attention"
    yield Target("cpu", op, "forward", "against eager", 5.0, f"{op}-.*-forward")
    yield Target("cpu", op, "forward and backward", "against eager", 3.0, f"{op}-.*-training")
    yield Target(
        "cpu", op, "the aim at 1x128x16x32x32, contiguous", "against eager", 10.0,
        f"{op}-1x128x16x32x32-heads-4-contiguous-forward",
    )  # fmt: skip
    yield Target("cpu", "conv3d", "oneDNN's own time", "against eager", 1.0, "conv3d-.*")
    yield Target("cpu", "norm_silu_conv3d", "the two ops' own time", "against eager", 1.0, "norm_silu_conv3d-.*")
    yield Target("cpu", "geglu", "forward", "against eager", 1.5, "geglu-.*-forward")
    yield Target("cpu", "geglu", "forward and backward", "against eager", 1.3, "geglu-.*-training")
    yield Target("cpu", "ddim_step", "2M elements, guidance and clip", "against eager", 5.0, "ddim_step-.*")
    yield Target("cpu", "ddim_step", "the aim there", "against eager", 10.0, "ddim_step-.*")
    yield from _networks("cpu", "VideoUNet", "VideoUNet", ".*", 1.5, 1.4)
    yield Target("cpu", "training", "fastvdiff train: training step", "against eager", 1.4, ".*")
    yield from _networks("cpu", "swap_kernels", "swapped networks", ".*", 1.5, 1.4)


TARGETS = (*_on_gpus(), *_on_cpus())


def covering(device: str, op: str, case: str) -> list[Target]:
    """The goals that an op's case is measured for."""
    return [target for target in TARGETS if target.device == device and target.covers(op, case)]


def against_eager(device: str, op: str, case: str) -> float | None:
    """Times faster than eager that a case is to be; not an aim beyond that, which is listed after it."""
    found = [target.value for target in covering(device, op, case) if target.measure == "against eager"]
    return found[0] if found else None


def microseconds(op: str, case: str, work: Work) -> float | None:
    """The time that the goals allow a GPU's case on an H200: of a training case, the forward's and the backward's."""
    for target in covering("cuda", op, case):
        if target.measure == "us":
            return target.value
        if target.measure == "TFLOP/s":
            return max(work.flops / target.value / 1e6, floor(work, _H200).us)
        if target.measure == "reached":
            return floor(work, _H200).us / target.value
        if target.measure == "backward reached":
            forward = microseconds(op, f"{case.removesuffix('training')}forward", work)
            assert forward is not None, case
            return forward + 1e6 * target.part * work.moved / _H200.copy / target.value
    return None
