"""What a text-to-video pipeline is called with: every argument checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from fastvdiff import checks

OUTPUT_TYPES = ("np", "pt", "pil")
MAX_SEED = 2**63 - 1


def fail(argument: str, expected: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` with the project's one message form."""
    checks.fail("TextToVideoPipeline", argument, expected, got, error)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def positive_int(argument: str, value: object) -> int:
    """An int of at least 1."""
    if not _is_int(value):
        fail(argument, "an int", checks.describe(value), TypeError)
    if value < 1:
        fail(argument, "at least 1", value)
    return value


def number(argument: str, value: object, least: float, most: float = math.inf) -> float:
    """A finite number in [least, most]."""
    limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
    if not _is_number(value):
        fail(argument, f"a finite number {limits}", checks.describe(value), TypeError)
    if not least <= value <= most:
        fail(argument, limits, value)
    return float(value)


def flag(argument: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        fail(argument, "True or False", checks.describe(value), TypeError)
    return value


def prompts(prompt: object) -> list[str]:
    """One prompt or several, none of them empty."""
    several = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(several, (list, tuple)) or any(not isinstance(each, str) for each in several):
        fail("prompt", "a str or a list of str", checks.describe(prompt), TypeError)
    if not several:
        fail("prompt", "at least one prompt", "an empty list")
    for index, each in enumerate(several):
        if not each.strip():
            fail("prompt", "some text", f"an empty prompt at position {index}")
    return list(several)


def negative_prompts(negative: object, count: int) -> list[str]:
    """What guidance leads away from, one for each prompt; "" is the unconditional embedding."""
    if negative is None:
        return [""] * count
    several = [negative] * count if isinstance(negative, str) else negative
    if not isinstance(several, (list, tuple)) or any(not isinstance(each, str) for each in several):
        fail("negative_prompt", "a str, a list of str or None", checks.describe(negative), TypeError)
    if len(several) != count:
        fail("negative_prompt", f"as many as there are prompts ({count})", len(several))
    return list(several)


def steps(value: object, trained: int) -> int:
    """The number of denoising steps."""
    count = positive_int("num_inference_steps", value)
    if count > trained:
        fail("num_inference_steps", f"at most {trained}, the steps of the schedule the model was trained with", count)
    return count


def guidance(scale: Any, frames: int, device: torch.device) -> float | torch.Tensor:
    """A guidance scale: a float, or for one scale a frame a float32 tensor (1, T)."""
    if isinstance(scale, torch.Tensor):
        scale = scale.item() if scale.dim() == 0 else scale.flatten().tolist()
    if not isinstance(scale, (list, tuple)):
        return number("guidance_scale", scale, 0)
    if len(scale) != frames:
        fail("guidance_scale", f"a number, or one for each of the {frames} frames", f"{len(scale)} numbers")
    return torch.tensor([[number("guidance_scale", each, 0) for each in scale]], device=device)


def seeds(seed: object, generator: object, videos: int) -> tuple[list[int] | None, list[torch.Generator]]:
    """The seed and the generator of each video; a seed s gives video i the seed s + i.

    seed: an int, one int for each video, or None, which draws one. generator: torch generators instead of a seed, one
    for all videos or one for each; then no seeds are known (None).
    """
    if generator is not None:
        if seed is not None:
            fail("seed", "None, as a generator is given", seed)
        several = [generator] if isinstance(generator, torch.Generator) else generator
        if not isinstance(several, (list, tuple)) or any(not isinstance(g, torch.Generator) for g in several):
            fail("generator", "a torch.Generator or a list of them", type(generator).__name__, TypeError)
        if len(several) not in (1, videos):
            fail("generator", f"one, or one for each of the {videos} videos", len(several))
        return None, list(several)
    if seed is None:
        seed = torch.randint(2**31, (), generator=_fresh()).item()
    chosen = [seed + i for i in range(videos)] if _is_int(seed) else seed
    if not isinstance(chosen, (list, tuple)) or any(not _is_int(each) for each in chosen):
        fail("seed", "an int or a list of ints", checks.describe(seed), TypeError)
    if len(chosen) != videos:
        fail("seed", f"an int, or one for each of the {videos} videos", f"{len(chosen)} ints")
    for each in chosen:
        if not 0 <= each <= MAX_SEED:
            fail("seed", f"0 to {MAX_SEED}", each)
    return list(chosen), [torch.Generator().manual_seed(each) for each in chosen]


def _fresh() -> torch.Generator:
    """A generator that differs from run to run and leaves torch's own random state alone."""
    generator = torch.Generator()
    generator.seed()
    return generator


def initial_latents(
    latents: object, shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device, draw: Any
) -> torch.Tensor:
    """The noise to start from: the caller's, checked, or drawn by each video's generator."""
    if latents is None:
        return draw(shape, generators, device)
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        fail("latents", "a floating-point tensor", type(latents).__name__, TypeError)
    if tuple(latents.shape) != tuple(shape):
        fail("latents", f"shape (B, C, T, H, W) = {tuple(shape)}", tuple(latents.shape))
    return latents.to(device)


def output_type(value: object) -> str:
    """One of "np", "pt", "pil"."""
    if value not in OUTPUT_TYPES:
        fail("output_type", f"one of {', '.join(map(repr, OUTPUT_TYPES))}", repr(value))
    return value
