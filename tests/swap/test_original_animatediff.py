"""The original AnimateDiff's modules, as doubles: version 1 pools the ResNet norms over frames, 2 and 3 do not."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fastvdiff
from tests.swap import contract
from tests.swap.doubles_animatediff import ResnetBlock3D, UNet3DConditionModel, VanillaTemporalModule

FRAMES = 5


def unet(**options: Any) -> tuple[nn.Module, contract.Inputs]:
    torch.manual_seed(0)
    inputs = {"sample": torch.randn(2, 4, FRAMES, 6, 7), "timestep": torch.tensor([7, 500])}
    return UNet3DConditionModel(**options), inputs


REPLACED = {"ResnetBlock3D": 2, "TemporalTransformer3DModel": 2}
MAKES = {
    "v2": unet,
    "v1": partial(unet, use_inflated_groupnorm=False),
    "v2 scale_shift": partial(unet, time_embedding_norm="scale_shift"),
    "v1 scale_shift": partial(unet, use_inflated_groupnorm=False, time_embedding_norm="scale_shift"),
}


@pytest.mark.parametrize("name", MAKES)
def test_output_every_gradient_keys_and_undo(name: str) -> None:
    model, inputs = MAKES[name]()
    report = contract.hold(model.eval(), inputs)
    assert contract.counts(report) == REPLACED
    assert contract.refusals(report.refused) == {"InflatedGroupNorm" if "v2" in name else "GroupNorm": 1}


@contract.narrow
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_16_bit_weights(name: str, dtype: torch.dtype) -> None:
    model, inputs = MAKES[name]()
    contract.hold(model.eval(), inputs, dtype)


def test_one_clip_and_channels_last_frames() -> None:
    model, inputs = unet()
    frames = inputs["sample"].transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    contract.hold(model.eval(), {**inputs, "sample": frames.unflatten(0, (-1, FRAMES)).transpose(1, 2)})
    contract.hold(model, {"sample": inputs["sample"][:1].clone(), "timestep": inputs["timestep"][:1]})


@pytest.mark.parametrize("inflated", [True, False], ids=["v2", "v1"])
def test_training_with_dropout_follows_eager(inflated: bool) -> None:
    make = partial(unet, dropout=0.1, use_inflated_groupnorm=inflated)
    contract.hold_training(lambda: make()[0], make()[1], torch.randn(2, 4, FRAMES, 6, 7))


@pytest.mark.parametrize("inflated", [True, False], ids=["v2", "v1"])
def test_no_graph_break_is_added(inflated: bool) -> None:
    model, inputs = unet(use_inflated_groupnorm=inflated)
    fastvdiff.swap_kernels(model.eval())
    assert contract.graphs_and_breaks(model, inputs) == (1, 0)


@pytest.mark.parametrize("inflated", [True, False], ids=["v2", "v1"])
def test_save_load_and_autocast(inflated: bool) -> None:
    make = partial(unet, use_inflated_groupnorm=inflated)
    contract.hold_round_trip(make()[0], *make())


def test_checkpointed_motion_modules_give_the_same_gradients() -> None:
    model, inputs = unet()
    contract.hold_checkpointing(model, inputs)


def test_what_is_not_understood_is_left_alone() -> None:
    blocks = nn.ModuleList([
        VanillaTemporalModule(16, cross=True), ResnetBlock3D(16, 16, 8, nonlinearity=nn.Mish()),
    ])  # fmt: skip
    report = fastvdiff.swap_kernels(blocks)
    reasons = {e.path: e.why for e in report.refused}
    assert reasons["0.temporal_transformer"] == "it attends to a text"
    assert "Mish, not SiLU" in reasons["1"]
    assert not report.replaced


def test_more_frames_than_positions_fail_as_before() -> None:
    model, _ = unet()
    fastvdiff.swap_kernels(model.eval())
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(torch.randn(1, 4, 9, 4, 4), torch.tensor([3]))


def test_a_hook_and_a_foreign_layer_are_called() -> None:
    model, inputs = unet()

    class Low(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean(-1, keepdim=True)

    attention = model.motion_modules[0].temporal_transformer.transformer_blocks[0].attention_blocks[0]
    attention.to_v = Low(32, 32, bias=False)
    contract.hold(model.eval(), inputs)
    seen: list[int] = []
    attention.register_forward_hook(lambda *a: seen.append(1))
    fastvdiff.swap_kernels(model)
    model(**inputs)
    assert seen == [1]


def test_one_time_step_for_a_batch() -> None:
    for options in ({}, {"time_embedding_norm": "scale_shift"}):
        contract.hold_one_time_step(*unet(**options), "timestep")


def test_attention_within_windows_is_left_alone() -> None:
    """FreeNoise's blocks, which have the original's names and arguments."""
    model, _ = unet()
    blocks = [m for m in model.modules() if type(m).__name__ == "TemporalTransformerBlock"]
    for block in blocks:
        block.local_window = True
    report = fastvdiff.swap_kernels(model)
    reasons = {e.why for e in report.refused if e.what == "TemporalTransformer3DModel"}
    assert blocks
    assert reasons == {"it attends within windows of frames"}
