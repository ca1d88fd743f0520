"""diffusers' video U-Nets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import I2VGenXLUNet, UNet3DConditionModel, UNetMotionModel, UNetSpatioTemporalConditionModel
from torch import nn

import fastvdiff
from tests.swap import contract


def unet3d(**options: Any) -> tuple[nn.Module, contract.Inputs]:
    torch.manual_seed(0)
    model = UNet3DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        norm_num_groups=8, cross_attention_dim=16, attention_head_dim=8, **options,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(2, 4, 3, 8, 8), "timestep": torch.tensor([7, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }  # fmt: skip


def motion(**options: Any) -> tuple[nn.Module, contract.Inputs]:
    torch.manual_seed(0)
    model = UNetMotionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), norm_num_groups=8, cross_attention_dim=16,
        num_attention_heads=4, motion_num_attention_heads=4, motion_max_seq_length=8, **options,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(2, 4, 3, 8, 8), "timestep": torch.tensor([7, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 16).repeat_interleave(3, dim=0),
    }  # fmt: skip


def svd(**options: Any) -> tuple[nn.Module, contract.Inputs]:
    torch.manual_seed(0)
    model = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=16,
        num_attention_heads=(4, 8), projection_class_embeddings_input_dim=96, addition_time_embed_dim=32, **options,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(2, 3, 4, 8, 8), "timestep": torch.tensor([7, 500]),
        "encoder_hidden_states": torch.randn(2, 1, 16), "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]] * 2),
    }  # fmt: skip


def i2vgen(**options: Any) -> tuple[nn.Module, contract.Inputs]:
    torch.manual_seed(0)
    model = I2VGenXLUNet(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        norm_num_groups=8, cross_attention_dim=16, attention_head_dim=8, num_attention_heads=8, **options,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(2, 4, 3, 8, 8), "timestep": torch.tensor([7, 500]), "fps": torch.tensor([8, 16]),
        "image_latents": torch.randn(2, 4, 3, 8, 8), "image_embeddings": torch.randn(2, 16),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }  # fmt: skip


REPLACED = {
    unet3d: {
        "UNet3DConditionModel": 1, "TransformerTemporalModel": 5, "ResnetBlock2D": 8, "TemporalConvLayer": 8,
        "Sequential": 32, "Conv3d": 32, "Attention": 4, "GEGLU": 9,
    },
    motion: {"UNetMotionModel": 1, "AnimateDiffTransformer3D": 7, "ResnetBlock2D": 8, "Attention": 4, "GEGLU": 11},
    svd: {
        "TransformerSpatioTemporalModel": 4, "ResnetBlock2D": 8, "TemporalResnetBlock": 8, "AlphaBlender": 12,
        "Attention": 8, "GEGLU": 12,
    },
    i2vgen: {
        "I2VGenXLUNet": 1, "TransformerTemporalModel": 5, "ResnetBlock2D": 8, "TemporalConvLayer": 8,
        "Sequential": 32, "Conv3d": 32, "Attention": 4, "GEGLU": 9,
    },
}  # fmt: skip
everywhere = pytest.mark.parametrize("make", REPLACED, ids=lambda make: make.__name__)


@everywhere
def test_output_every_gradient_keys_and_undo(make: Any) -> None:
    model, inputs = make()
    report = contract.hold(model.eval(), inputs)
    assert contract.counts(report) == REPLACED[make]
    assert {e.what for e in report.refused} <= {"GroupNorm"}
    assert all("not beside a SiLU" in e.why for e in report.refused)


@contract.mostly_bfloat16
@pytest.mark.parametrize(
    "make",
    [unet3d, svd, *(pytest.param(make, marks=pytest.mark.long) for make in (motion, i2vgen))],
    ids=lambda make: getattr(make, "__name__", None),
)
def test_16_bit_weights(make: Any, dtype: torch.dtype) -> None:
    model, inputs = make()
    contract.hold(model.eval(), inputs, dtype)


@pytest.mark.parametrize("make", [motion, svd], ids=lambda make: make.__name__)
def test_a_model_in_channels_last(make: Any) -> None:
    model, inputs = make()
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    contract.hold(model.eval(), inputs)


def test_training_with_dropout_follows_eager() -> None:
    """UNet3D's temporal convolutions drop 10 % in training: another mask would show at once."""
    _, inputs = unet3d()
    contract.hold_training(lambda: unet3d()[0], inputs, torch.randn(2, 4, 3, 8, 8) * 2)


@pytest.mark.parametrize(
    "make",
    [motion, svd, pytest.param(i2vgen, marks=pytest.mark.long)],
    ids=lambda make: getattr(make, "__name__", None),
)
def test_training_follows_eager(make: Any) -> None:
    inputs = make()[1]
    contract.hold_training(lambda: make()[0], inputs, torch.randn(inputs["sample"].shape) * 2)


@pytest.mark.parametrize(
    "make",
    [motion, svd, *(pytest.param(make, marks=pytest.mark.long) for make in (unet3d, i2vgen))],
    ids=lambda make: getattr(make, "__name__", None),
)
def test_no_graph_break_is_added(make: Any) -> None:
    model, inputs = make()
    before = contract.graphs_and_breaks(model.eval(), inputs)
    fastvdiff.swap_kernels(model)
    assert contract.graphs_and_breaks(model, inputs) == before


@pytest.mark.parametrize("make", [unet3d, motion], ids=lambda make: make.__name__)
def test_a_text_has_keys_and_values_once_for_all_frames(make: Any) -> None:
    model, inputs = make()
    rows: list[int] = []
    keys = next(m for name, m in model.named_modules() if name.endswith("attn2.to_k") and m.in_features == 16)
    keys.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    fastvdiff.swap_kernels(model.eval())
    with torch.no_grad():
        model(**inputs)
    model(**inputs)
    assert rows == [2, 6]


def test_a_text_that_differs_between_frames_is_not_shared() -> None:
    model, inputs = motion()
    text = inputs["encoder_hidden_states"]
    with torch.no_grad():
        report = fastvdiff.swap_kernels(model.eval())
        model(**inputs)  # remembered as one text for all frames
        text[1].mul_(-3)
        swapped = model(**inputs).sample
        report.undo()
        torch.testing.assert_close(swapped, model(**inputs).sample, rtol=1e-4, atol=1e-4)


@everywhere
def test_save_and_load(make: Any, tmp_path: Path) -> None:
    contract.hold_saved(*make(), tmp_path)


@everywhere
def test_state_dict_pickle_and_autocast(make: Any) -> None:
    contract.hold_round_trip(make()[0], *make())


def test_a_peft_adapter_is_trained_and_counted() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = motion()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with torch.no_grad():
        before = model.eval()(**inputs).sample
        fastvdiff.swap_kernels(model)
        after = model(**inputs).sample
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    model(**inputs).sample.square().mean().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)
    model.disable_adapters()
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).sample, after)


def test_a_lora_layer_inside_a_block_is_called() -> None:
    model, inputs = motion()

    class Low(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean(-1, keepdim=True)

    attn = model.down_blocks[0].motion_modules[0].transformer_blocks[0].attn1
    attn.to_q = Low(32, 32, bias=False)
    attn.to_out[0] = Low(32, 32)
    contract.hold(model.eval(), inputs)


def test_checkpointed_temporal_layers_keep_less_and_give_the_same_gradients() -> None:
    contract.hold_checkpointing(*unet3d())


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("make", [motion, svd], ids=lambda make: make.__name__)
def test_diffusers_own_checkpointing(make: Any, before: bool) -> None:
    """UNet3DConditionModel and I2VGenXLUNet have none."""
    model, inputs = make()
    contract.hold_own_checkpointing(model, inputs, model, before)


@pytest.mark.long
def test_more_sequences_than_a_grid_dimension_holds() -> None:
    """65,536 positions and more: attention kernels that put them in one grid dimension fail there."""
    model, _ = motion()
    block = model.down_blocks[0].motion_modules[0].eval()
    x = torch.randn(2, 32, 260, 256)
    with torch.no_grad():
        before = block(x, num_frames=2)
        fastvdiff.swap_kernels(model)
        torch.testing.assert_close(block(x, num_frames=2), before, rtol=1e-4, atol=1e-4)
