"""Traffic and arithmetic against rows worked out by hand, at 4.3 TB/s and 790 TFLOP/s."""

from __future__ import annotations

import pytest

from benchmarks import roofline, traffic
from benchmarks.gpu_cases import CASES
from benchmarks.limits import DEVICES, Limits, floor, target
from benchmarks.shapes import ANIMATEDIFF, SVD, VAE, VDM, Level

H200 = DEVICES["h200"]
LEVELS = {level.name: level for level in (*SVD, *ANIMATEDIFF, *VDM, *VAE)}


def by_hand(name: str, tensor: int, norm: tuple[float, float], conv: float, attention: float, sequences: int) -> object:
    return pytest.param(LEVELS[name], tensor, norm, conv, attention, sequences, id=name)


@pytest.mark.parametrize(
    ("level", "megabytes", "norm", "conv", "attention", "sequences"),
    [
        by_hand("svd-l0", 295, (137, 206), 1075, 274, 92_160),
        by_hand("svd-l1", 147, (69, 103), 1075, 137, 46_080),
        by_hand("svd-l3", 18, (8.6, 12.9), 269, 17, 5_760),
        by_hand("animatediff-l0", 84, (39, 59), 306, 78, 65_536),
        by_hand("animatediff-l3", 5, (2.4, 3.7), 76, 4.9, 1_024),
        by_hand("vdm-l0", 34, (16, 23), 25, 125, 131_072),
        by_hand("vdm-l3", 4, (2, 3), 25, 2.0, 2_048),
    ],
)
def test_rows_worked_out_by_hand(
    level: Level, megabytes: float, norm: tuple[float, float], conv: float, attention: float, sequences: int
) -> None:
    work = traffic.group_norm_silu(level.clip)
    assert work.moved / 3e6 == pytest.approx(megabytes, rel=0.06)
    assert floor(work, H200, least=True).us == pytest.approx(norm[0], rel=0.03)
    assert floor(work, H200).us == pytest.approx(norm[1], rel=0.03)
    assert floor(work, H200).binds == "memory"
    assert level.sequences == sequences
    core = traffic.temporal_attention(sequences, level.frames, level.dim)
    assert floor(core, H200).us == pytest.approx(attention, rel=0.03)
    spatial = traffic.conv3d(level.batch, level.channels, level.channels, level.clip[2:], (1, 3, 3))
    assert floor(spatial, H200).us == pytest.approx(conv, rel=0.03)
    assert floor(spatial, H200).binds == "arithmetic"


def test_attention_does_half_a_frame_count_of_operations_per_byte() -> None:
    for frames in (16, 25):
        assert traffic.temporal_attention(1000, frames, 64).intensity == pytest.approx(frames / 2)


def test_backward_passes_over_memory() -> None:
    """Attention moves 7T, the norm 5T: x and dy twice, dx once."""
    shape, tensor = (1, 64, 4, 8, 8), 64 * 4 * 8 * 8 * 2
    forward, training = (traffic.group_norm_silu(shape, training=t).moved for t in (False, True))
    assert (forward, training - forward) == (3 * tensor, 5 * tensor)
    forward, training = (traffic.temporal_attention(256, 4, 16, training=t).moved for t in (False, True))
    assert (forward, training - forward) == (4 * 256 * 4 * 16 * 2, 7 * 256 * 4 * 16 * 2)


def test_the_block_of_the_original_network_is_bound_by_arithmetic() -> None:
    """49 us of products against 16 us of bytes, where the unfused ideal moves 265 us."""
    work = traffic.temporal_attention_block(4, 64, 16, 64 * 64, 256)
    assert floor(work, H200).us == pytest.approx(49, rel=0.01)
    assert floor(work, H200).binds == "arithmetic"
    assert 1e6 * work.moved / H200.copy == pytest.approx(16, rel=0.03)


def test_the_gate_moves_both_halves_and_the_result() -> None:
    result = 100 * 1280 * 2
    assert traffic.geglu(100, 1280).moved == 3 * result
    assert traffic.geglu(100, 1280, training=True).moved == 8 * result


def test_the_step_moves_four_or_five_tensors() -> None:
    shape = (2, 4, 16, 64, 64)
    tensor = 2 * 4 * 16 * 64 * 64 * 2
    assert traffic.ddim_step(shape, original=False).moved == 4 * tensor
    assert traffic.ddim_step(shape).moved == 5 * tensor
    assert traffic.ddim_step(shape, noise=True).moved == 6 * tensor
    threshold = traffic.ddim_step(shape, threshold=True)
    assert (threshold.moved, threshold.least) == (11 * tensor, 5 * tensor)


def test_a_target_is_the_same_share_of_every_devices_floor() -> None:
    work = traffic.group_norm_silu((1, 128, 20, 256, 256))
    half = Limits("half", H200.copy / 2, H200.matrix / 2, H200.vector / 2, "")
    assert target(work, 240.0, H200) == pytest.approx(240.0)
    assert target(work, 240.0, half) == pytest.approx(480.0)
    assert target(work, None, half) is None


def test_no_target_lies_below_its_floor() -> None:
    for case in CASES:
        assert case.target_us is None or case.target_us >= floor(case.work, H200, least=True).us, case.name


@pytest.mark.parametrize("device", sorted(DEVICES))
def test_the_command_prints_a_line_per_workload(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["--device", device])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len({case.workload for case in CASES})
    found = next(line.split() for line in lines if line.startswith("group_norm_silu-vae-1x128x20x256x256-forward"))
    assert found[4] == "memory"
    assert found[-1] == "97.5%"  # 234 us of 240
    if device == "h200":
        assert [float(v) for v in found[5:8]] == pytest.approx([234.1, 156.1, 240.0])


def test_case_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
