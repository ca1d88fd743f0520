r"""Make a clip with diffusers' AnimateDiff pipeline; two lines are fastvdiff's.

    python examples/animatediff.py "a corgi running on a beach" -o corgi.gif \
        --base SG161222/Realistic_Vision_V5.1_noVAE --motion-adapter guoyww/animatediff-motion-adapter-v1-5-2

`--tiny` runs the same pipeline with a small network of random weights and no download: noise, but the whole path.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel

import fastvdiff

DDIM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "linspace",
}


def pretrained(base: str, motion_adapter: str, device: str) -> AnimateDiffPipeline:
    """An image model of the Stable Diffusion 1.5 family with a motion adapter."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    adapter = MotionAdapter.from_pretrained(motion_adapter, torch_dtype=dtype)
    pipe = AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter, torch_dtype=dtype)
    pipe.scheduler = DDIMScheduler(**DDIM)
    return pipe.to(device)


def tiny() -> AnimateDiffPipeline:
    """The same pipeline, small and random, without a text encoder."""
    torch.manual_seed(0)
    channels = (32, 64)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=4,
    )
    adapter = MotionAdapter(
        block_out_channels=channels,
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=4,
    )
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    return AnimateDiffPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        motion_adapter=adapter,
        scheduler=DDIMScheduler(**DDIM),
    )


def main(arguments: Sequence[str] | None = None) -> Any:
    """Write the clip; returns its frames."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", required=True, help="a .gif file")
    parser.add_argument("--base", default="SG161222/Realistic_Vision_V5.1_noVAE")
    parser.add_argument("--motion-adapter", default="guoyww/animatediff-motion-adapter-v1-5-2")
    parser.add_argument("--tiny", action="store_true", help="random weights, no download")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, help="height and width in pixels; by default the model's")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = tiny().to(device) if options.tiny else pretrained(options.base, options.motion_adapter, device)
    pipe.set_progress_bar_config(disable=options.tiny)
    print(fastvdiff.swap_kernels(pipe.unet))  # <-- the one line: same weights, same numbers, fused kernels
    print(fastvdiff.swap_scheduler(pipe))  # <-- and the DDIM step as one kernel

    if options.tiny:
        text = torch.randn(2, 1, 6, 32, generator=torch.Generator().manual_seed(options.seed)).to(device)
        prompt = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
    else:
        prompt = {"prompt": options.prompt}
    frames = pipe(
        **prompt,
        num_frames=options.frames,
        height=options.size,
        width=options.size,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=torch.Generator().manual_seed(options.seed),
    ).frames[0]
    frames[0].save(options.output, save_all=True, append_images=frames[1:], duration=125, loop=0)
    return frames


if __name__ == "__main__":
    main()
