"""lucidrains' video-diffusion-pytorch as a rival in training: its U-Net, loss, optimizer and averaged weights.

    pip install --no-deps video-diffusion-pytorch einops-exts rotary-embedding-torch && pip install einops

Its data set of GIFs, which is all that needs torchvision, is not used: without torchvision an empty module stands in.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

NEEDS = ("video_diffusion_pytorch", "einops", "einops_exts", "rotary_embedding_torch")
EMA_EVERY = 10  # steps, its trainer's default
EMA_DECAY = 0.995


def missing() -> str:
    """What is not installed, in words; empty where it can run."""
    names = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(names)}" if names else ""


def _imported() -> Any:
    try:
        return importlib.import_module("video_diffusion_pytorch")
    except (ImportError, RuntimeError):  # torchvision is missing, or is another torch's
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "torchvision"}
        stand_in = types.ModuleType("torchvision")
        stand_in.transforms, stand_in.utils = types.SimpleNamespace(ToTensor=object), types.SimpleNamespace()
        sys.modules["torchvision"] = stand_in
        try:
            return importlib.import_module("video_diffusion_pytorch")
        finally:
            del sys.modules["torchvision"]
            sys.modules.update(before)


def training_step(
    channels: int, multipliers: Sequence[int], shape: tuple[int, int, int, int, int], max_grad_norm: float
) -> tuple[Callable[[], Any], int]:
    """One training step on a batch (B, C, T, H, W) as its trainer makes it; with the number of its parameters."""
    library = _imported()
    _, _, frames, size, _ = shape
    unet = library.Unet3D(dim=channels, dim_mults=tuple(multipliers))
    diffusion = library.GaussianDiffusion(unet, image_size=size, num_frames=frames, timesteps=1000)
    average = copy.deepcopy(diffusion)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4)
    video, count = torch.rand(shape), 0

    def step() -> None:
        nonlocal count
        diffusion(video).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if count % EMA_EVERY == 0:
            with torch.no_grad():
                for mine, theirs in zip(average.parameters(), diffusion.parameters(), strict=True):
                    mine.lerp_(theirs, 1 - EMA_DECAY)
        count += 1

    return step, sum(parameter.numel() for parameter in unet.parameters())
