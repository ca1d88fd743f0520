"""Video networks of diffusers at a size that a CPU trains: a fifth of the published widths, two levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

FRAMES, SIZE, WIDTHS, TEXT = 8, 32, (64, 128), 128
_LEVELS = {"sample_size": SIZE, "block_out_channels": WIDTHS, "layers_per_block": 1, "cross_attention_dim": TEXT}


def _inputs(**more: Any) -> dict[str, Any]:
    video = torch.randn(1, 4, FRAMES, SIZE, SIZE)
    return {"sample": video, "timestep": 500, "encoder_hidden_states": torch.randn(1, 77, TEXT), **more}


def unet3d() -> tuple[nn.Module, dict[str, Any]]:
    """ModelScope's and zeroscope's."""
    from diffusers import UNet3DConditionModel

    model = UNet3DConditionModel(
        **_LEVELS, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), norm_num_groups=16, attention_head_dim=16,
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    return model, _inputs()


def motion() -> tuple[nn.Module, dict[str, Any]]:
    """AnimateDiff's."""
    from diffusers import UNetMotionModel

    model = UNetMotionModel(
        **_LEVELS, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), norm_num_groups=16,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=8,
    )  # fmt: skip
    return model, _inputs(encoder_hidden_states=torch.randn(1, 77, TEXT).repeat_interleave(FRAMES, dim=0))


def svd() -> tuple[nn.Module, dict[str, Any]]:
    """Stable Video Diffusion's."""
    from diffusers import UNetSpatioTemporalConditionModel

    model = UNetSpatioTemporalConditionModel(
        **_LEVELS, in_channels=4, num_attention_heads=(4, 8),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        projection_class_embeddings_input_dim=96, addition_time_embed_dim=32,
    )  # fmt: skip
    video = torch.randn(1, FRAMES, 4, SIZE, SIZE)
    return model, _inputs(
        sample=video, encoder_hidden_states=torch.randn(1, 1, TEXT), added_time_ids=torch.ones(1, 3)
    )  # fmt: skip


def hunyuan_vae() -> tuple[nn.Module, dict[str, Any]]:
    """HunyuanVideo's autoencoder: encode and decode."""
    from diffusers import AutoencoderKLHunyuanVideo

    model = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(32, 32, 64), down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3, layers_per_block=1, norm_num_groups=8,
        spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip
    return model, {"sample": torch.randn(1, 3, 9, 2 * SIZE, 2 * SIZE)}


CASES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "UNet3DConditionModel": unet3d,
    "UNetMotionModel": motion,
    "UNetSpatioTemporalConditionModel": svd,
    "AutoencoderKLHunyuanVideo": hunyuan_vae,
}
