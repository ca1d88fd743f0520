"""The goals: all of them there, each with cases that exist, and times that follow from them."""

from __future__ import annotations

import pytest

from benchmarks import cases, gpu_cases, targets
from benchmarks.limits import DEVICES, floor

H200 = DEVICES["h200"]
GPU = {case.name: case for case in gpu_cases.CASES}


def test_every_goal_of_the_ops_is_there() -> None:
    stated = {(t.op, t.measure, t.value) for t in targets.TARGETS if t.device == "cuda"}
    networks = {
        (op, measure, value)
        for op in ("VideoUNet", "swap_kernels")
        for measure, value in (("against eager", 2.0), ("against eager", 1.5), ("memory", 0.6))
    }
    assert stated == networks | {
        ("group_norm_silu", "us", 240.0), ("group_norm_silu", "us", 22.0),
        ("group_norm_silu", "backward reached", 0.85),
        ("temporal_attention", "us", 310.0), ("temporal_attention", "us", 90.0),
        ("temporal_attention", "backward reached", 0.8), ("temporal_attention", "backward against best", 3.0),
        ("temporal_attention_block", "us", 80.0),
        ("conv3d", "TFLOP/s", 600.0), ("conv3d", "against cuDNN", 0.95), ("conv3d", "against cuDNN", 1.15),
        ("conv3d", "TFLOP/s", 250.0), ("conv3d", "workspace", 0.0),
        ("geglu", "reached", 0.88), ("ddim_step", "reached", 0.88), ("VideoUNet", "against compiled", 1.3),
    }  # fmt: skip
    assert {(t.op, t.measure, t.value) for t in targets.TARGETS if t.device == "cpu"} == {
        ("group_norm_silu", "against eager", 2.0), ("group_norm_silu", "against eager", 3.0),
        ("group_norm_silu", "against eager", 1.5),
        ("temporal_attention", "against eager", 5.0), ("temporal_attention", "against eager", 3.0),
        ("temporal_attention", "against eager", 10.0),
        ("conv3d", "against eager", 1.0), ("norm_silu_conv3d", "against eager", 1.0),
        ("geglu", "against eager", 1.5), ("geglu", "against eager", 1.3),
        ("ddim_step", "against eager", 5.0), ("ddim_step", "against eager", 10.0),
        *((op, "against eager", v) for op in ("VideoUNet", "swap_kernels") for v in (1.5, 1.4)),
        *((op, "memory", 0.6) for op in ("VideoUNet", "swap_kernels")), ("training", "against eager", 1.4),
    }  # fmt: skip


@pytest.mark.parametrize("target", [t for t in targets.TARGETS if t.op in {c.op for c in gpu_cases.CASES}], ids=str)
def test_every_goal_of_an_op_has_cases(target: targets.Target) -> None:
    known = gpu_cases.CASES if target.device == "cuda" else cases.CASES
    assert any(target.covers(case.op, case.name) for case in known)


def test_forward_times_are_those_stated() -> None:
    for name, us in {
        "group_norm_silu-vae-1x128x20x256x256-channels_last-forward": 240.0,
        "group_norm_silu-vae-1x512x8x45x80-contiguous-forward": 22.0,
        "temporal_attention-svd-l0-contiguous-forward": 310.0,
        "temporal_attention-animatediff-l0-channels_last-forward": 90.0,
        "temporal_attention_block-vdm-l0-channels_last-forward": 80.0,
    }.items():
        assert GPU[name].target_us == us
    assert GPU["temporal_attention-svd-l1-contiguous-forward"].target_us is None


def test_a_training_case_has_the_backward_s_share_besides() -> None:
    """By hand: 5T of 335.5 MB at 85 % of 4.3 TB/s, 8T of 294.9 MB at 80 %."""
    norm = GPU["group_norm_silu-vae-1x128x20x256x256-channels_last-training"]
    assert norm.target_us == pytest.approx(240 + 5 * 335.54 / 4.3 / 0.85, rel=1e-4)
    attention = GPU["temporal_attention-svd-l0-contiguous-training"]
    assert attention.target_us == pytest.approx(310 + 8 * 294.91 / 4.3 / 0.8, rel=1e-4)


def test_rates_become_times() -> None:
    conv = GPU["conv3d-svd-l0-kernel-1x3x3-channels_last-forward"]
    assert conv.target_us == pytest.approx(conv.work.flops / 600e6)
    tf32 = GPU["conv3d-vae-1x512x8x45x80-kernel-3x3x3-tf32-channels_last-forward"]
    assert tf32.target_us == pytest.approx(tf32.work.flops / 250e6)
    step = GPU["ddim_step-256-MB-guidance-clip-contiguous-forward"]
    assert step.target_us == pytest.approx(floor(step.work, H200).us / 0.88)
    assert GPU["conv3d-vdm-l0-kernel-1x3x3-channels_last-forward"].target_us is None  # 64 channels


def test_an_aim_beyond_a_goal_does_not_replace_it() -> None:
    assert targets.against_eager("cpu", "ddim_step", "ddim_step-2M-elements-guidance-clip-contiguous-forward") == 5.0
    name = "temporal_attention-1x128x16x32x32-heads-4-contiguous-forward"
    assert targets.against_eager("cpu", "temporal_attention", name) == 5.0
    assert len(targets.covering("cpu", "temporal_attention", name)) == 2
