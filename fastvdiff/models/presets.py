"""Named configurations."""

from __future__ import annotations

from .config import VideoUNetConfig

PRESETS: dict[str, VideoUNetConfig] = {
    # 16 frames of 32x32 beside a small text encoder, trained and run on two CPU cores: most parameters sit at the 4x4
    # level, where they cost little. fastvdiff/assets/shapes.toml, the shipped checkpoint's recipe, changes some of it.
    "tiny": VideoUNetConfig(
        base_channels=32,
        channel_multipliers=(1, 2, 4),
        blocks_per_level=1,
        patch_size=2,
        temporal_attention_levels=(0, 1, 2),
        spatial_attention_levels=(1, 2),
        cross_attention_levels=(1, 2),
        cross_attention_dim=128,
        pooled_text=True,
        num_heads=None,
        head_dim=32,
    ),
    # The sizes of the original video diffusion U-Net (Ho et al., arXiv:2204.03458): pixels, 8 heads of 32.
    "vdm": VideoUNetConfig(
        base_channels=64,
        channel_multipliers=(1, 2, 4, 8),
        blocks_per_level=2,
        stem_kernel_size=7,
        num_heads=8,
        head_dim=32,
        temporal_position="rotary+relative",
    ),
    # Latent diffusion at the sizes of Stable Diffusion 1 with text of CLIP ViT-L/14's width (Rombach et al.,
    # arXiv:2112.10752), and a temporal convolution and attention in every block.
    "latent": VideoUNetConfig(
        in_channels=4,
        out_channels=4,
        base_channels=320,
        channel_multipliers=(1, 2, 4, 4),
        blocks_per_level=2,
        conv="factorized",
        temporal_attention_levels=(0, 1, 2, 3),
        spatial_attention_levels=(0, 1, 2),
        cross_attention_levels=(0, 1, 2),
        cross_attention_dim=768,
        num_heads=None,
        head_dim=64,
        feed_forward_mult=4,
        time_conditioning="add",
        norm_groups=32,
    ),
}
