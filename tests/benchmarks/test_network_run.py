"""Whole networks as a GPU would race them, at small sizes on the CPU; the published ones by their parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import fastvdiff
from benchmarks import network_run, published
from benchmarks.device_race import DeviceRace
from benchmarks.published import NETWORKS, Network
from fastvdiff import dispatch
from tests.benchmarks.fake_device import FakeDevice


def tiny(batch: int) -> published.Built:
    model = fastvdiff.VideoUNet.from_preset("tiny", channel_multipliers=(1, 2), temporal_attention_levels=(0, 1),
                                            spatial_attention_levels=(1,), cross_attention_levels=(1,))  # fmt: skip
    return model, {
        "sample": torch.randn(batch, 3, 4, 16, 16), "timestep": 500, "encoder_hidden_states": torch.randn(batch, 5, 128)
    }  # fmt: skip


class Block(nn.Module):
    """What `swap_kernels` finds in any network."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0)))

    def enable_gradient_checkpointing(self) -> None:
        pass

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layers(sample),)


def another(batch: int) -> published.Built:
    return Block(), {"sample": torch.randn(batch, 16, 4, 6, 6)}


def drive(race: DeviceRace) -> None:
    for _ in range(3):
        race.round()


def measure(network: Network, drive: Any = drive) -> Any:
    return network_run.measure(network, "cpu", FakeDevice(), compiled=False, drive=drive)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(("op", "build"), [("VideoUNet", tiny), ("swap_kernels", another)], ids=["own", "swapped"])
def test_a_network_is_checked_and_raced(op: str, build: Any, training: bool) -> None:
    row = measure(Network(op, "small", build, 1, training, checkpointed=training))
    assert (row.op, row.case) == (op, f"small-batch-1-{'training' if training else 'forward'}")
    assert row.correct, row.failure
    assert set(row.times) == {"eager", "eager channels_last", "fastvdiff"}
    assert row.extra.keys() == {f"peak MB {name}" for name in row.times}
    assert row.device is None
    assert "refused" not in row.record()


def test_a_wrong_network_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: torch.nn.Module) -> None:
        model.register_forward_hook(lambda module, inputs, result: (1.2 * result[0],))

    monkeypatch.setattr(fastvdiff, "swap_kernels", broken)
    row = measure(Network("swap_kernels", "small", another, 1, False))
    assert (row.correct, row.times) == (False, {})
    assert row.failure.startswith("output: relative error")


def test_who_lacks_memory_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager may need more than there is: the others are timed all the same, and the row says who did not take part."""

    def out_of_memory(call: Any) -> Any:
        def run() -> Any:
            if torch.is_grad_enabled():  # the race's, not the check's
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB")
            return call()

        return run

    monkeypatch.setattr(network_run, "on_reference", out_of_memory)
    row = measure(Network("VideoUNet", "small", tiny, 1, True))
    assert set(row.times) == {"fastvdiff"}
    assert row.record()["refused"]["eager"].startswith("CUDA out of memory")


def test_without_a_drive_it_is_only_checked() -> None:
    row = measure(Network("VideoUNet", "small", tiny, 1, True), None)
    assert (row.correct, row.times, row.extra) == (True, {}, {})


def test_kernels_run_by_themselves_only_within_the_race() -> None:
    before = dispatch._FOUND
    with network_run.as_after_verify("cuda"):
        assert "group_norm_silu.triton" in dispatch._FOUND["cuda"]
    assert dispatch._FOUND is before


@pytest.mark.parametrize(
    ("build", "millions", "clip"),
    [
        (published.svd, 1525, (25, 72, 128)), (published.animatediff, 1313, (16, 64, 64)),
        (published.zeroscope, 1411, (24, 40, 72)),
    ],
    ids=["svd", "animatediff", "zeroscope"],
)  # fmt: skip
def test_published_networks_have_the_published_sizes(
    build: Any, millions: int, clip: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters of the released checkpoints; drawing values for tensors that have no memory would take a minute."""
    pytest.importorskip("diffusers")
    for name in ("kaiming_uniform_", "uniform_", "normal_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **named: tensor)
    with torch.device("meta"):
        model, inputs = build(2)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)
    sizes = [n for n in inputs["sample"].shape[1:] if n not in (4, 8)]
    assert tuple(sizes) == clip


def test_forward_and_training_of_every_network() -> None:
    found = {(network.label, network.training) for network in NETWORKS}
    assert found == {(network.label, training) for network in NETWORKS for training in (False, True)}
    assert len({network.name for network in NETWORKS}) == len(NETWORKS)
    assert {n.label.partition("-")[0] for n in NETWORKS} == {
        "VideoUNet", "UNetMotionModel", "UNet3DConditionModel", "UNetSpatioTemporalConditionModel"
    }  # fmt: skip
    autotuned = dataclasses.replace(NETWORKS[0], compile_mode="max-autotune")
    assert network_run.compiled_name(autotuned) == "torch.compile max-autotune"
