"""The networks that `swap_kernels` knows, at a size that a CPU trains: a fifth of the published widths, two levels.

diffusers' own classes, and for the repositories that are no libraries the doubles of tests/swap: their blocks, rebuilt
from their published configurations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Case = tuple[nn.Module, dict[str, Any]]

FRAMES, SIZE, WIDTHS, TEXT = 8, 32, (64, 128), 128
_LEVELS = {"sample_size": SIZE, "block_out_channels": WIDTHS, "layers_per_block": 1, "cross_attention_dim": TEXT}


def _inputs(**more: Any) -> dict[str, Any]:
    video = torch.randn(1, 4, FRAMES, SIZE, SIZE)
    text = torch.randn(1, 77, TEXT)
    return {"sample": video, "timestep": 500, "encoder_hidden_states": text, "return_dict": False, **more}


def _clip(frames: int = FRAMES + 1) -> dict[str, Any]:
    """For an autoencoder, which encodes and decodes it."""
    return {"sample": torch.randn(1, 3, frames, 2 * SIZE, 2 * SIZE), "return_dict": False}


def unet3d() -> Case:
    """ModelScope's and zeroscope's."""
    from diffusers import UNet3DConditionModel

    model = UNet3DConditionModel(
        **_LEVELS, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), norm_num_groups=16, attention_head_dim=16,
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    return model, _inputs()


def motion() -> Case:
    """AnimateDiff's."""
    from diffusers import UNetMotionModel

    model = UNetMotionModel(
        **_LEVELS, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), norm_num_groups=16,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=8,
    )  # fmt: skip
    return model, _inputs(encoder_hidden_states=torch.randn(1, 77, TEXT).repeat_interleave(FRAMES, dim=0))


def svd() -> Case:
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


def hunyuan_vae() -> Case:
    """HunyuanVideo's autoencoder: encode and decode."""
    from diffusers import AutoencoderKLHunyuanVideo

    model = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(32, 32, 64), down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3, layers_per_block=1, norm_num_groups=8,
        spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip
    return model, _clip()


def cogvideox_vae() -> Case:
    """CogVideoX's autoencoder."""
    from diffusers import AutoencoderKLCogVideoX

    model = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(32, 64), latent_channels=4, layers_per_block=1, norm_num_groups=8,
        temporal_compression_ratio=2,
    )  # fmt: skip
    return model, _clip()


def wan_vae() -> Case:
    """Wan's autoencoder."""
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(
        base_dim=32, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return model, _clip()


def ltx_vae() -> Case:
    """LTX-Video's autoencoder."""
    from diffusers import AutoencoderKLLTXVideo

    model = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(32, 64), decoder_block_out_channels=(32, 64),
        down_block_types=("LTXVideoDownBlock3D",) * 2, layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False), decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3, downsample_type=("conv",) * 2, upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2, patch_size=1,
    )  # fmt: skip
    return model, _clip()


def mochi_vae() -> Case:
    """Mochi's autoencoder."""
    from diffusers import AutoencoderKLMochi

    model = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 64, 64), decoder_block_out_channels=(64, 64, 32, 32), latent_channels=4,
        layers_per_block=(1, 1, 1, 1, 1), temporal_expansions=(1, 2, 1), spatial_expansions=(1, 2, 1),
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return model, _clip()


def easyanimate_vae() -> Case:
    """EasyAnimate's autoencoder."""
    from diffusers import AutoencoderKLMagvit

    model = AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=[32, 64],
        down_block_types=["SpatialDownBlock3D", "SpatialTemporalDownBlock3D"],
        up_block_types=["SpatialUpBlock3D", "SpatialTemporalUpBlock3D"], layers_per_block=1, norm_num_groups=8,
    )  # fmt: skip
    return model, _clip()


def svd_vae() -> Case:
    """Stable Video Diffusion's autoencoder, whose decoder is the temporal one."""
    from diffusers import AutoencoderKLTemporalDecoder

    model = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2
    )
    return model, {"sample": torch.randn(FRAMES, 3, 2 * SIZE, 2 * SIZE), "num_frames": FRAMES, "return_dict": False}


def i2vgen() -> Case:
    """I2VGen-XL's."""
    from diffusers import I2VGenXLUNet

    model = I2VGenXLUNet(
        **_LEVELS, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), norm_num_groups=16,
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=16, num_attention_heads=8,
    )  # fmt: skip
    still = torch.randn(1, 4, FRAMES, SIZE, SIZE)
    return model, _inputs(fps=torch.tensor([8]), image_latents=still, image_embeddings=torch.randn(1, TEXT))


def original_animatediff() -> Case:
    """ResNet blocks and motion modules of guoyww/AnimateDiff."""
    from tests.swap.doubles_animatediff import UNet3DConditionModel

    video = torch.randn(1, 4, FRAMES, SIZE, SIZE)
    return UNet3DConditionModel(WIDTHS[0], 4 * WIDTHS[0]), {"sample": video, "timestep": torch.tensor([500])}


def unet_sd() -> Case:
    """Blocks of ModelScope's own UNetSD."""
    from tests.swap.doubles_modelscope import UNetSD

    video, text = torch.randn(1, 4, FRAMES, SIZE, SIZE), torch.randn(1, 77, TEXT)
    return UNetSD(WIDTHS[0], TEXT), {"x": video, "t": torch.tensor([500]), "y": text}


def lvdm() -> Case:
    """Blocks of VideoCrafter's UNetModel."""
    from tests.swap.doubles_lvdm import UNetModel

    video, text = torch.randn(1, 4, FRAMES, SIZE, SIZE), torch.randn(1, 77, TEXT)
    return UNetModel(WIDTHS[0], TEXT), {"x": video, "timesteps": torch.tensor([500]), "context": text}


def sgm() -> Case:
    """Blocks of Stability's VideoUNet."""
    from tests.swap.doubles_sgm import VideoUNet

    return VideoUNet(WIDTHS[0], TEXT, merge_strategy="learned_with_images"), {
        "x": torch.randn(FRAMES, 4, SIZE, SIZE), "timesteps": torch.full((FRAMES,), 500),
        "context": torch.randn(1, 1, TEXT).repeat_interleave(FRAMES, 0), "time_context": None,
        "num_video_frames": FRAMES, "image_only_indicator": torch.zeros(1, FRAMES),
    }  # fmt: skip


def vdm(groups: int | None) -> Case:
    """Blocks of lucidrains' video-diffusion-pytorch: GroupNorm up to 0.6, RMSNorm since."""
    from tests.swap.doubles_vdm import Unet3D

    return Unet3D(WIDTHS[0], groups=groups), {
        "x": torch.randn(1, 3, FRAMES, SIZE, SIZE), "time": torch.tensor([500])
    }  # fmt: skip


def imagen() -> Case:
    """Blocks of imagen-pytorch's video U-Net."""
    from tests.swap.doubles_imagen import Unet3D

    return Unet3D(WIDTHS[0]), {"x": torch.randn(1, 3, FRAMES, SIZE, SIZE), "time": torch.tensor([500])}


def monai() -> Case:
    """Blocks of MONAI's DiffusionModelUNet and AutoencoderKL, on a volume."""
    from tests.swap.doubles_monai import Network

    return Network(3, WIDTHS[0]), {"x": torch.randn(1, 3, 2 * FRAMES, SIZE, SIZE), "timesteps": torch.tensor([500])}


CASES: dict[str, Callable[[], Case]] = {
    "UNet3DConditionModel": unet3d,
    "UNetMotionModel": motion,
    "UNetSpatioTemporalConditionModel": svd,
    "I2VGenXLUNet": i2vgen,
    "AutoencoderKLHunyuanVideo": hunyuan_vae,
    "AutoencoderKLCogVideoX": cogvideox_vae,
    "AutoencoderKLWan": wan_vae,
    "AutoencoderKLLTXVideo": ltx_vae,
    "AutoencoderKLMochi": mochi_vae,
    "AutoencoderKLMagvit": easyanimate_vae,
    "AutoencoderKLTemporalDecoder": svd_vae,
    "AnimateDiff": original_animatediff,
    "UNetSD": unet_sd,
    "VideoCrafter-UNetModel": lvdm,
    "sgm-VideoUNet": sgm,
    "video-diffusion-pytorch-0.6": functools.partial(vdm, 8),
    "video-diffusion-pytorch-0.7": functools.partial(vdm, None),
    "imagen-pytorch": imagen,
    "MONAI": monai,
}
