"""Blocks of other people's networks where conv3d's CUDA kernels run: the norms between convolutions are taken along."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer, TemporalResnetBlock
from torch import nn

import fastvdiff
from fastvdiff import dispatch
from tests.swap import doubles_monai, doubles_sgm
from tests.swap.contract import hold

from .conv3d_library import shim

KERNELS = dict.fromkeys(("conv3d", "group_norm_silu", "norm_silu_conv3d"), "cuda")
COMMON = {"groups": 4, "eps": 1e-5, "temb_channels": 12}


@pytest.fixture(autouse=True)
def _on_shim(on_shim: object) -> Iterator[None]:
    with shim(), dispatch.use_impl(**KERNELS):
        yield


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


FRAMES, VIDEO = (4, 8, 5, 3), (2, 8, 3, 4, 3)
# What is built, its inputs, and how many norms are left as passes of their own.
BLOCKS = {
    "frames": (lambda: ResnetBlock2D(in_channels=8, out_channels=16, **COMMON),
               {"input_tensor": draw(*FRAMES), "temb": draw(4, 12)}, 1),
    "frames, scale and shift": (lambda: ResnetBlock2D(in_channels=8, time_embedding_norm="scale_shift", **COMMON),
                                {"input_tensor": draw(*FRAMES), "temb": draw(4, 12)}, 1),
    "video": (lambda: TemporalResnetBlock(in_channels=32, out_channels=32, temb_channels=12, eps=1e-5),
              {"input_tensor": draw(2, 32, 3, 4, 3), "temb": draw(2, 3, 12)}, 1),
    "four convolutions over frames": (lambda: TemporalConvLayer(8, 8, dropout=0.0, norm_num_groups=4),
                                      {"hidden_states": draw(6, 8, 4, 3), "num_frames": 3}, 1),
    "sgm, frames": (lambda: doubles_sgm.ResBlock(8, 12, dropout=0.0), {"x": draw(*FRAMES), "emb": draw(4, 12)}, 1),
    "sgm, video": (lambda: doubles_sgm.ResBlock(8, 12, 0.0, dims=3, kernel_size=[3, 1, 1], exchange_temb_dims=True),
                   {"x": draw(*VIDEO), "emb": draw(2, 3, 12)}, 1),
    "MONAI, images": (lambda: doubles_monai.AEKLResBlock(2, 8, 16), {"x": draw(*FRAMES)}, 1),
    "MONAI, volumes": (lambda: doubles_monai.DiffusionUNetResnetBlock(3, 8, 12, 16),
                       {"x": draw(*VIDEO), "emb": draw(2, 12)}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_output_and_every_gradient(name: str) -> None:
    build, inputs, passes = BLOCKS[name]
    block = build().bfloat16()
    for norm in (m for m in block.modules() if isinstance(m, doubles_sgm.GroupNorm32)):
        norm.float()  # as the library has it
    hold(block, inputs, torch.bfloat16)
    fastvdiff.swap_kernels(block)
    ran = [walk.op for walk in dispatch.trace(block, **inputs)]
    assert ran.count("group_norm_silu") == passes
    assert "norm_silu_conv3d" in ran


def test_any_convolution() -> None:
    model = nn.Sequential(nn.Conv3d(8, 8, 3, stride=(1, 2, 1), padding=1))
    inputs: dict[str, Any] = {"input": draw(*VIDEO)}
    hold(model.bfloat16(), inputs, torch.bfloat16)
    fastvdiff.swap_kernels(model)
    assert [(walk.op, walk.chosen) for walk in dispatch.trace(model, **inputs)] == [("conv3d", "cuda")]


@pytest.mark.parametrize("change", ["hook", "lora"])
def test_a_watched_convolution_is_called(change: str) -> None:
    """Neither a hook nor a layer in a convolution's place may be passed over."""
    block, seen = BLOCKS["frames"][0]().bfloat16(), []
    if change == "hook":
        block.conv2.register_forward_hook(lambda m, args, y: seen.append(args[0]))
    else:
        inner = block.conv2
        block.conv2 = nn.Sequential(inner)
        block.conv2.register_forward_hook(lambda m, args, y: seen.append(args[0]))
    fastvdiff.swap_kernels(block)
    inputs = BLOCKS["frames"][1]
    ran = [walk.op for walk in dispatch.trace(block, **inputs)]
    assert len(seen) == 1
    assert "norm_silu_conv3d" not in ran


def test_another_kind_of_dropout_is_called() -> None:
    block = BLOCKS["frames"][0]().bfloat16().train()
    block.dropout = nn.Dropout2d(0.5)
    fastvdiff.swap_kernels(block)
    inputs = BLOCKS["frames"][1]
    assert "norm_silu_conv3d" not in [walk.op for walk in dispatch.trace(block, **inputs)]
    assert not torch.equal(block(**inputs), block(**inputs))
