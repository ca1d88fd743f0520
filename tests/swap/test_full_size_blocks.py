"""One block of every kind at its published width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoResnetBlockCausal3D
from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoResnetBlock3d
from diffusers.models.autoencoders.autoencoder_kl_magvit import EasyAnimateResidualBlock3D
from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiResnetBlock3D
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock, TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel, TransformerTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import nn

from tests.swap import (
    contract,
    doubles_animatediff,
    doubles_imagen,
    doubles_lvdm,
    doubles_modelscope,
    doubles_monai,
    doubles_sgm,
    doubles_vdm,
)

FRAMES = 16


def frames(channels: int, size: int = 16) -> torch.Tensor:
    return torch.randn(FRAMES, channels, size, size)


def resnet() -> tuple[nn.Module, contract.Inputs]:
    block = ResnetBlock2D(in_channels=320, out_channels=640, temb_channels=1280, eps=1e-5)
    return block, {"input_tensor": frames(320), "temb": torch.randn(FRAMES, 1280)}


def temporal_convolutions() -> tuple[nn.Module, contract.Inputs]:
    return TemporalConvLayer(320, dropout=0.1), {"hidden_states": frames(320), "num_frames": FRAMES}


def modelscope_transformer() -> tuple[nn.Module, contract.Inputs]:
    block = TransformerTemporalModel(5, 64, in_channels=320)
    return block, {"hidden_states": frames(320), "num_frames": FRAMES, "return_dict": False}


def animatediff_transformer() -> tuple[nn.Module, contract.Inputs]:
    block = AnimateDiffTransformer3D(
        8, 40, in_channels=320, positional_embeddings="sinusoidal", num_positional_embeddings=32
    )
    return block, {"hidden_states": frames(320), "num_frames": FRAMES}


def svd_resnet() -> tuple[nn.Module, contract.Inputs]:
    block = SpatioTemporalResBlock(320, 320, temb_channels=1280)
    indicator = torch.zeros(1, FRAMES)
    return block, {
        "hidden_states": frames(320), "temb": torch.randn(FRAMES, 1280), "image_only_indicator": indicator.long()
    }  # fmt: skip


def svd_transformer() -> tuple[nn.Module, contract.Inputs]:
    block = TransformerSpatioTemporalModel(5, 64, in_channels=320, cross_attention_dim=1024)
    return block, {
        "hidden_states": frames(320), "encoder_hidden_states": torch.randn(1, 1, 1024).expand(FRAMES, -1, -1),
        "image_only_indicator": torch.zeros(1, FRAMES).long(), "return_dict": False,
    }  # fmt: skip


def clip(channels: int, frame_count: int = 5, size: int = 16) -> torch.Tensor:
    return torch.randn(1, channels, frame_count, size, size)


def hunyuan_resnet() -> tuple[nn.Module, contract.Inputs]:
    return HunyuanVideoResnetBlockCausal3D(256, 512), {"hidden_states": clip(256)}


def cogvideox_resnet() -> tuple[nn.Module, contract.Inputs]:
    return Output(CogVideoXResnetBlock3D(256, 512, temb_channels=0)), {"inputs": clip(256)}


def wan_resnet() -> tuple[nn.Module, contract.Inputs]:
    return WanResidualBlock(192, 384), {"x": clip(192)}


def ltx_resnet() -> tuple[nn.Module, contract.Inputs]:
    return LTXVideoResnetBlock3d(256, 512), {"inputs": clip(256)}


def mochi_resnet() -> tuple[nn.Module, contract.Inputs]:
    return Output(MochiResnetBlock3D(512)), {"inputs": clip(512)}


def easyanimate_resnet() -> tuple[nn.Module, contract.Inputs]:
    return FirstChunk(EasyAnimateResidualBlock3D(256, 512)), {"inputs": clip(256)}


def original_motion_module() -> tuple[nn.Module, contract.Inputs]:
    block = doubles_animatediff.TemporalTransformer3DModel(320, heads=8, groups=32, max_len=24, cross=False)
    return block, {"hidden_states": clip(320, FRAMES)}


def original_resnet() -> tuple[nn.Module, contract.Inputs]:
    block = doubles_animatediff.ResnetBlock3D(320, 640, 1280, groups=32)
    return block, {"input_tensor": clip(320, FRAMES), "temb": torch.randn(1, 1280)}


def lvdm_resnet() -> tuple[nn.Module, contract.Inputs]:
    block = doubles_lvdm.ResBlock(320, 1280, 640, use_temporal_conv=True)
    return block, {"x": frames(320), "emb": torch.randn(FRAMES, 1280), "batch_size": 1}


def modelscope_block() -> tuple[nn.Module, contract.Inputs]:
    block = doubles_modelscope.ResBlock(320, 1280, 640)
    return block, {"x": frames(320), "emb": torch.randn(FRAMES, 1280), "batch_size": 1}


def sgm_resnet() -> tuple[nn.Module, contract.Inputs]:
    block = doubles_sgm.VideoResBlock(320, 1280, 640, merge_strategy="learned_with_images")
    return block, {
        "x": frames(320), "emb": torch.randn(FRAMES, 1280), "num_video_frames": FRAMES,
        "image_only_indicator": torch.zeros(1, FRAMES),
    }  # fmt: skip


def pixel_unet(groups: int | None) -> tuple[nn.Module, contract.Inputs]:
    """The published one has 64 channels, 8 heads of 32 and 8 groups."""
    return doubles_vdm.Unet3D(64, groups=groups), {"x": clip(3, FRAMES), "time": torch.tensor([500])}


def imagen_unet() -> tuple[nn.Module, contract.Inputs]:
    return doubles_imagen.Unet3D(128), {"x": clip(3, FRAMES), "time": torch.tensor([500])}


def monai_resnet() -> tuple[nn.Module, contract.Inputs]:
    block = doubles_monai.DiffusionUNetResnetBlock(3, 128, 512, 256)
    return block, {"x": torch.randn(1, 128, 16, 16, 16), "emb": torch.randn(1, 512)}


class Output(nn.Module):
    """A block that returns its result and what the next call needs, without the latter."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.block(inputs)[0]


class FirstChunk(nn.Module):
    """A block that keeps frames for the next chunk of a video, as if there were none."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        y = self.block(inputs)
        for module in self.modules():
            if hasattr(module, "prev_features"):
                module.prev_features = None
        return y


BLOCKS: dict[str, Callable[[], Any]] = {
    **{make.__name__: make for make in (
        resnet, temporal_convolutions, modelscope_transformer, animatediff_transformer, svd_resnet, svd_transformer,
        hunyuan_resnet, cogvideox_resnet, wan_resnet, ltx_resnet, mochi_resnet, easyanimate_resnet,
        original_motion_module, original_resnet, lvdm_resnet, modelscope_block, sgm_resnet, imagen_unet, monai_resnet,
    )},
    "pixel_unet": partial(pixel_unet, 8), "pixel_unet_rms": partial(pixel_unet, None),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str) -> None:
    torch.manual_seed(0)
    block, inputs = BLOCKS[name]()
    report = contract.hold(block.train(), inputs)
    assert report.replaced
