"""diffusers' video autoencoders: encode and decode, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import fastvdiff
from tests.swap import contract


class Whole(nn.Module):
    """Encodes to the mean and decodes it."""

    def __init__(self, vae: nn.Module, decoding: dict[str, Any]) -> None:
        super().__init__()
        self.vae, self.decoding = vae, decoding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.vae.modules():
            if hasattr(module, "prev_features"):
                module.prev_features = None  # a new video
        z = self.vae.encode(x).latent_dist.mean
        return self.vae.decode(z, **self.decoding).sample


def hunyuan() -> tuple[nn.Module, contract.Inputs]:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 16), down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3, layers_per_block=1, norm_num_groups=4,
        spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip
    return Whole(vae, {}), {"x": torch.randn(1, 3, 5, 8, 8)}


def cogvideox() -> tuple[nn.Module, contract.Inputs]:
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        temporal_compression_ratio=2,
    )  # fmt: skip
    return Whole(vae, {}), {"x": torch.randn(1, 3, 9, 8, 8)}


def wan() -> tuple[nn.Module, contract.Inputs]:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return Whole(vae, {}), {"x": torch.randn(1, 3, 5, 8, 8)}


def ltx() -> tuple[nn.Module, contract.Inputs]:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
        down_block_types=("LTXVideoDownBlock3D",) * 2, layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False), decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3, downsample_type=("conv",) * 2, upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2, patch_size=1,
    )  # fmt: skip
    return Whole(vae, {}), {"x": torch.randn(1, 3, 5, 8, 8)}


def mochi() -> tuple[nn.Module, contract.Inputs]:
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32), latent_channels=4,
        layers_per_block=(1, 1, 1, 1, 1), temporal_expansions=(1, 2, 1), spatial_expansions=(1, 2, 1),
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return Whole(vae, {}), {"x": torch.randn(1, 3, 3, 16, 16)}


def easyanimate() -> tuple[nn.Module, contract.Inputs]:
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=[8, 16],
        down_block_types=["SpatialDownBlock3D", "SpatialTemporalDownBlock3D"],
        up_block_types=["SpatialUpBlock3D", "SpatialTemporalUpBlock3D"], layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    return Whole(vae, {}), {"x": torch.randn(1, 3, 5, 8, 8)}


def svd_decoder() -> tuple[nn.Module, contract.Inputs]:
    vae = diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(32,), layers_per_block=1)
    return Whole(vae, {"num_frames": 3}), {"x": torch.randn(3, 3, 8, 8)}


REPLACED = {
    hunyuan: {"HunyuanVideoCausalConv3d", "HunyuanVideoResnetBlockCausal3D"},
    cogvideox: {"CogVideoXCausalConv3d", "CogVideoXResnetBlock3D"},
    wan: {"WanCausalConv3d"},
    ltx: {"LTXVideoCausalConv3d"},
    mochi: {"CogVideoXCausalConv3d", "MochiResnetBlock3D"},
    easyanimate: {"EasyAnimateCausalConv3d", "EasyAnimateResidualBlock3D"},
    svd_decoder: {"ResnetBlock2D", "TemporalResnetBlock", "AlphaBlender", "Conv3d"},
}


everywhere = pytest.mark.parametrize("make", REPLACED, ids=lambda make: make.__name__)
SECONDS = (ltx, svd_decoder)  # to trace; the others take 8 to 20


@everywhere
def test_output_every_gradient_keys_and_undo(make: Any) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    report = contract.hold(model.eval(), inputs)
    assert {e.what for e in report.replaced} == REPLACED[make]
    assert all(e.why for e in report.refused)


@contract.mostly_bfloat16
@pytest.mark.parametrize(
    "make",
    [pytest.param(make, marks=pytest.mark.long) if make is mochi else make for make in REPLACED],
    ids=lambda make: getattr(make, "__name__", None),
)
def test_16_bit_weights(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    contract.hold(model.eval(), inputs, dtype)


def test_channels_last_3d_is_kept_through_a_block() -> None:
    model, _ = hunyuan()
    block = model.vae.encoder.mid_block.resnets[0].eval()
    fastvdiff.swap_kernels(model)
    x = torch.randn(1, 16, 3, 6, 5).contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        assert block(x).is_contiguous(memory_format=torch.channels_last_3d)


@everywhere
def test_training_follows_eager(make: Any) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return make()[0]

    torch.manual_seed(1)
    inputs = make()[1]
    contract.hold_training(model, inputs, torch.randn(contract.sample_of(model()(**inputs)).shape))


@everywhere
def test_save_and_load(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole, inputs = make()
    contract.hold_saved(whole.vae, inputs, tmp_path, lambda vae: Whole(vae, whole.decoding))


@everywhere
def test_state_dict_pickle_and_autocast(make: Any) -> None:
    torch.manual_seed(0)
    contract.hold_round_trip(make()[0], *make())


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("make", [hunyuan, cogvideox, ltx, mochi, svd_decoder], ids=lambda make: make.__name__)
def test_diffusers_own_checkpointing(make: Any, before: bool) -> None:
    """Wan has none; EasyAnimate's, which keeps frames from call to call, fails in its own forward."""
    torch.manual_seed(0)
    model, inputs = make()
    contract.hold_own_checkpointing(model, inputs, model.vae, before)


@pytest.mark.parametrize(
    "make",
    [make if make in SECONDS else pytest.param(make, marks=pytest.mark.long) for make in REPLACED],
    ids=lambda make: getattr(make, "__name__", None),
)
def test_no_graph_break_is_added(make: Any) -> None:
    model, inputs = make()
    fastvdiff.swap_kernels(model.eval())
    assert contract.graphs_and_breaks(model, inputs) == (1, 0)
