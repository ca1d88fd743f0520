"""One block of every kind at its published width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock, TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel, TransformerTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import nn

from tests.swap import contract

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


BLOCKS: list[Callable[[], Any]] = [
    resnet, temporal_convolutions, modelscope_transformer, animatediff_transformer, svd_resnet, svd_transformer,
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("make", BLOCKS, ids=lambda make: make.__name__)
def test_block(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    block, inputs = make()
    report = contract.hold(block.train(), inputs)
    assert report.replaced
