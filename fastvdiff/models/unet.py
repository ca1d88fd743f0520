"""The video U-Net (Ho et al., "Video Diffusion Models", arXiv:2204.03458): pixels or latents, space-time factorised."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from fastvdiff import checks
from fastvdiff.nn import (
    Conv3d,
    Downsample3d,
    GroupNormSiLU,
    TimestepEmbedding,
    Upsample3d,
    checkpoint,
    timestep_embedding,
)

from . import inputs, pretrained
from .blocks import Conditions, VideoBlock
from .config import VideoUNetConfig
from .coordinates import CoordinateField
from .frame_positions import FramePositions
from .patches import patchify, unpatchify
from .pooled_text import PooledText
from .presets import PRESETS


@dataclass(frozen=True)
class VideoUNetOutput:
    """What `VideoUNet` returns with return_dict=True."""

    sample: torch.Tensor  # (B, out_channels, T, H, W)


class VideoUNet(nn.Module, PyTorchModelHubMixin, library_name="fastvdiff", tags=["video-diffusion"]):
    """Predicts the noise (or v, or the clip) in a noisy clip, given the diffusion time and a text.

    Blocks of residual convolution and attention over space, text and time, at resolutions that halve and double again;
    each block on the way up also sees what its counterpart on the way down made. `save_pretrained` writes
    model.safetensors and config.json, `from_pretrained` reads them, both without a network for a local folder. The
    output convolution and every residual branch start at 0.

    Args:
        config: sizes and kinds, see `VideoUNetConfig`.
    """

    def __init__(self, config: VideoUNetConfig) -> None:
        super().__init__()
        if not isinstance(config, VideoUNetConfig):
            checks.fail("VideoUNet", "config", "a VideoUNetConfig", checks.describe(config), TypeError)
        self.config = config
        self.gradient_checkpointing = config.gradient_checkpointing
        widths, last = config.level_channels, len(config.level_channels) - 1
        base, pixels = config.base_channels, config.patch_frames * config.patch_size**2
        kernel, half = config.stem_kernel_size, config.stem_kernel_size // 2

        self.time_embedding = TimestepEmbedding(base, 4 * base)
        self.pooled_text = None
        if config.pooled_text and config.cross_attention_dim is not None:
            self.pooled_text = PooledText(config.cross_attention_dim, 4 * base)
        self.frame_positions = FramePositions(config)
        self.conv_in = Conv3d(
            (config.in_channels + config.conditioning_channels) * pixels, base, (1, kernel, kernel),
            padding=(0, half, half),
        )  # fmt: skip
        self.coordinates = CoordinateField(base, 4 * base, 4 * base) if config.coordinates else None

        self.encoder = nn.ModuleDict()
        channels, skips = base, []
        for level, width in enumerate(widths):
            for index in range(config.blocks_per_level):
                self.encoder[f"level{level}_block{index}"] = VideoBlock(config, channels, level)
                skips.append(width)
                channels = width
            if level < last:
                self.encoder[f"level{level}_downsample"] = Downsample3d(channels, use_conv=True)

        self.middle = nn.ModuleDict({f"block{i}": VideoBlock(config, channels, last) for i in range(2)})

        self.decoder = nn.ModuleDict()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(config.blocks_per_level):
                self.decoder[f"level{level}_block{index}"] = VideoBlock(config, channels + skips.pop(), level)
                channels = width
            if level > 0:
                self.decoder[f"level{level}_upsample"] = Upsample3d(channels, use_conv=True)

        self.norm_out = GroupNormSiLU(config.norm_groups, channels, config.norm_eps)
        self.conv_out = Conv3d(channels, config.out_channels * pixels, (1, 3, 3), padding=(0, 1, 1))
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A fresh model of the named sizes ("tiny", "vdm", "latent"), with any config field overridden."""
        if name not in PRESETS:
            checks.fail("VideoUNet.from_preset", "name", f"one of {', '.join(PRESETS)}", repr(name))
        return cls(VideoUNetConfig.from_dict({**PRESETS[name].to_dict(), **overrides}))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **options: Any) -> Self:
        """The model that `save_pretrained` wrote into a folder, or one from the hub, in float32 and eval mode.

        Args:
            pretrained_model_name_or_path: a folder, or a hub name such as "user/model".
            options: map_location, and for the hub revision, cache_dir, token, force_download and local_files_only.

        Raises:
            FileNotFoundError: the folder, its config.json or its model.safetensors is not there.
            ValueError: one of the files is broken, or the two do not fit; the message names the file.
        """
        return pretrained.load(cls, VideoUNetConfig.from_dict, str(pretrained_model_name_or_path), **options)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.conv_in.weight.device

    def enable_gradient_checkpointing(self) -> None:
        """Recompute every block in the backward pass of training: less memory, about a third more time."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep every block's activations for the backward pass."""
        self.gradient_checkpointing = False

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None = None,
        *,
        encoder_attention_mask: torch.Tensor | None = None,
        conditioning: torch.Tensor | None = None,
        image_only: torch.Tensor | Sequence[bool] | None = None,
        frame_positions: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> torch.Tensor | VideoUNetOutput | tuple[torch.Tensor]:
        """One denoising evaluation.

        Args:
            sample: (B, in_channels, T, H, W) noisy clip, any T, H and W.
            timestep: diffusion time, an int, a float, or a tensor of shape () or (B,).
            encoder_hidden_states: (B, L, cross_attention_dim), the text; needed if and only if the model has text.
            encoder_attention_mask: (B, L), bool or 0 and 1: the tokens that count.
            conditioning: (B, conditioning_channels, T, H, W), put beside the sample's channels.
            image_only: B flags, a bool tensor or a list. A flagged sample is T images, not a clip: its frames run as T
                clips of one frame, so that nothing (attention, convolution, normalisation) mixes them. Under
                torch.compile give a list: the values of a tensor would have to be read in the middle of the graph.
            frame_positions: (T,) where the frames are, in frames; 0 .. T-1 if None. Fractions are fine.
            return_dict: None gives the tensor, True an object with `.sample`, False a 1-tuple.

        Returns:
            (B, out_channels, T, H, W), contiguous.

        Raises:
            ValueError, TypeError: an argument does not fit the model; the message names it.
        """
        batch = inputs.check(
            self.config, self.dtype, sample, timestep, encoder_hidden_states, encoder_attention_mask, conditioning,
            frame_positions,
        )  # fmt: skip
        if image_only is None:
            prediction = self._predict(batch)
        else:
            prediction = inputs.run_apart(self._predict, batch, inputs.check_flags(image_only, len(sample)))
        if return_dict is None:
            return prediction
        return VideoUNetOutput(prediction) if return_dict else (prediction,)

    def _predict(self, batch: inputs.Batch) -> torch.Tensor:
        """The network itself, on checked inputs."""
        time = timestep_embedding(batch.timesteps, self.config.base_channels, True, 0)
        time = self.time_embedding(time.to(self.dtype))
        if self.pooled_text is not None:
            time = time + self.pooled_text(batch.text, batch.text_mask)
        positions = batch.positions[:: self.config.patch_frames]
        conditions = Conditions(time, batch.text, batch.text_mask, self.frame_positions(positions))
        x, skips = patchify(batch.sample, self.config.patch_size, self.config.patch_frames), []
        x = self.conv_in(x)
        if self.coordinates is not None:
            x = self.coordinates(x, time, positions)
        for layer in self.encoder.values():
            if isinstance(layer, VideoBlock):
                x = self._run(layer, x, conditions)
                skips.append(x)
            else:
                x = layer(x)
        for block in self.middle.values():
            x = self._run(block, x, conditions)
        for layer in self.decoder.values():
            if isinstance(layer, VideoBlock):
                x = self._run(layer, torch.cat([x, skips.pop()], dim=1), conditions)
            else:
                # An odd size was rounded up on the way down: the counterpart's size undoes it.
                x = layer(x, output_size=skips[-1].shape[3:])
        x = self.conv_out(self.norm_out(x))
        return unpatchify(x, self.config.patch_size, batch.sample.shape[2:], self.config.patch_frames)

    def _run(self, block: VideoBlock, x: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, conditions)
        return block(x, conditions)
