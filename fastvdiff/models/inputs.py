"""What a VideoUNet is called with: checks, and the split of a batch into clips and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from fastvdiff import checks

from .config import VideoUNetConfig


class Batch(NamedTuple):
    """Checked inputs of one evaluation."""

    sample: torch.Tensor  # (B, in_channels + conditioning_channels, T, H, W)
    timesteps: torch.Tensor  # (B,)
    text: torch.Tensor | None  # (B, L, D)
    text_mask: torch.Tensor | None  # (B, L) bool
    positions: torch.Tensor  # (T,)


def _fail(argument: str, expected: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    checks.fail("VideoUNet", argument, expected, got, error)


def check(
    config: VideoUNetConfig,
    dtype: torch.dtype,
    sample: torch.Tensor,
    timestep: torch.Tensor | float,
    text: torch.Tensor | None,
    text_mask: torch.Tensor | None,
    conditioning: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> Batch:
    """The arguments of `VideoUNet.forward` as a `Batch`; ValueError or TypeError names what does not fit."""
    if not isinstance(sample, torch.Tensor):
        _fail("sample", "a tensor", type(sample).__name__, TypeError)
    if sample.dim() != 5 or sample.shape[1] != config.in_channels:
        _fail("sample", f"shape (B, {config.in_channels}, T, H, W)", tuple(sample.shape))
    if 0 in sample.shape[2:]:
        _fail("sample", "at least one frame, row and column", tuple(sample.shape))
    if sample.dtype != dtype and not torch.is_autocast_enabled(sample.device.type):
        _fail("sample", f"{dtype} as the model's parameters, or autocast", sample.dtype, TypeError)
    batch, frames = sample.shape[0], sample.shape[2]
    if positions is None:
        positions = torch.arange(frames, device=sample.device)
    elif tuple(positions.shape) != (frames,):
        _fail("frame_positions", f"shape (T,) = ({frames},)", tuple(positions.shape))
    return Batch(
        _with_conditioning(config, sample, conditioning),
        _timesteps(timestep, batch, sample.device),
        *_text(config, batch, text, text_mask),
        positions,
    )


def _with_conditioning(
    config: VideoUNetConfig, sample: torch.Tensor, conditioning: torch.Tensor | None
) -> torch.Tensor:
    channels = config.conditioning_channels
    if conditioning is None:
        if channels:
            shape = (sample.shape[0], channels, *sample.shape[2:])
            _fail("conditioning", f"shape {shape}: the model has {channels} conditioning channels", None)
        return sample
    if channels == 0:
        _fail("conditioning", "None: the model has no conditioning channels", tuple(conditioning.shape))
    shape = (sample.shape[0], channels, *sample.shape[2:])
    if tuple(conditioning.shape) != shape:
        _fail("conditioning", f"shape {shape}", tuple(conditioning.shape))
    return torch.cat([sample, conditioning.to(sample.dtype)], dim=1)


def _timesteps(timestep: torch.Tensor | float, batch: int, device: torch.device) -> torch.Tensor:
    if isinstance(timestep, torch.Tensor):
        if tuple(timestep.shape) not in ((), (1,), (batch,)):
            _fail("timestep", f"a number, or a tensor of shape () or (B,) = ({batch},)", tuple(timestep.shape))
        return timestep.to(device).expand(batch)
    if isinstance(timestep, bool) or not isinstance(timestep, (int, float)):
        _fail("timestep", "an int, a float or a tensor", type(timestep).__name__, TypeError)
    return torch.full((batch,), timestep, device=device, dtype=torch.float32)


def _text(
    config: VideoUNetConfig, batch: int, text: torch.Tensor | None, mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    width = config.cross_attention_dim
    if width is None:
        if text is not None:
            _fail("encoder_hidden_states", "None: the model has no cross_attention_dim", tuple(text.shape))
        if mask is not None:
            _fail("encoder_attention_mask", "None: the model has no cross_attention_dim", tuple(mask.shape))
        return None, None
    if text is None:
        _fail("encoder_hidden_states", f"the text, shape (B, L, {width})", None)
    if text.dim() != 3 or text.shape[0] != batch or text.shape[2] != width:
        _fail("encoder_hidden_states", f"shape (B, L, D) = ({batch}, L, {width})", tuple(text.shape))
    if mask is None:
        return text, None
    if mask.shape != text.shape[:2]:
        _fail("encoder_attention_mask", f"shape (B, L) = {tuple(text.shape[:2])}", tuple(mask.shape))
    return text, mask.bool()


def check_flags(image_only: torch.Tensor | Sequence[bool], batch: int) -> list[bool]:
    """One Python bool for each sample."""
    flags = image_only.tolist() if isinstance(image_only, torch.Tensor) else list(image_only)
    if len(flags) != batch or any(type(flag) is not bool for flag in flags):
        _fail("image_only", f"B = {batch} bools", flags)
    return flags


def run_apart(predict: Callable[[Batch], torch.Tensor], batch: Batch, images: Sequence[bool]) -> torch.Tensor:
    """Predict for a batch in which some samples are not clips but T images each.

    Clips run as they are; the images' frames run as clips of one frame, at position 0. So joint image-video training
    (Ho et al., arXiv:2204.03458, section 3) needs no mask in any layer, and images pay for no frame attention.
    """
    clips = [i for i, image in enumerate(images) if not image]
    stills = [i for i, image in enumerate(images) if image]
    frames = batch.sample.shape[2]
    parts = []
    if clips or not stills:
        parts.append(predict(_select(batch, clips)))
    if stills:
        chosen = _select(batch, stills)
        folded = Batch(
            chosen.sample.transpose(1, 2).flatten(0, 1)[:, :, None],
            chosen.timesteps.repeat_interleave(frames),
            *(None if x is None else x.repeat_interleave(frames, dim=0) for x in (chosen.text, chosen.text_mask)),
            batch.positions.new_zeros(1),
        )
        parts.append(predict(folded).squeeze(2).unflatten(0, (len(stills), frames)).transpose(1, 2))
    order = clips + stills
    return torch.cat(parts)[[order.index(i) for i in range(len(order))]]


def _select(batch: Batch, indices: list[int]) -> Batch:
    def rows(x: Any) -> Any:
        return None if x is None else x[indices]

    return Batch(rows(batch.sample), rows(batch.timesteps), rows(batch.text), rows(batch.text_mask), batch.positions)
