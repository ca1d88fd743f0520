"""From a prompt to a video: text encoder, U-Net and scheduler in one object."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from fastvdiff.diffusion import DDIMScheduler, DDPMScheduler, draw_noise
from fastvdiff.models import VideoUNet
from fastvdiff.text import ByteTextEncoder

from . import arguments, folder
from .denoising import AfterStep, Denoiser, LoopInputs
from .frames import to_frames
from .graph_capture import GraphCache, reason_against

DEFAULT_STEPS = 50
DEFAULT_GUIDANCE = 1.5

Callback = Callable[["TextToVideoPipeline", int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


@dataclass(frozen=True)
class VideoOutput:
    """What a pipeline returns: `frames` as `output_type` says, and the seed of each video (None with generators)."""

    frames: Any
    seeds: list[int] | None


class TextToVideoPipeline:
    """Samples videos from prompts with classifier-free guidance.

    ```python
    pipeline = TextToVideoPipeline.from_pretrained("tiny")
    frames = pipeline("a red circle moving right", seed=7).frames          # (1, T, H, W, 3) in [0, 1]
    ```

    One denoising step is one U-Net evaluation on the conditional and unconditional halves together, and one fused
    scheduler step that guides as it goes: the loop never waits for the device.

    With `cuda_graph` the whole loop is one CUDA graph. The first call of a kind records it; every later one fills the
    graph's inputs and launches it once, with bitwise the result of the ordinary loop. Calls are of one kind when they
    have the same number of videos, sizes, steps, eta, rescale, padded prompt length, kernels and torch settings:
    prompts, seeds and guidance scales are free. The pipeline keeps the 4 kinds used last. They share the activations'
    memory; each has its own inputs and, where steps add noise, the noise of all steps (steps x the samples' size),
    drawn before the replay. Weights updated in place count from the next call on; weights that moved, another U-Net or
    scheduler, and `to` drop the graphs. A call that cannot be replayed (not on CUDA, a callback, a scheduler of another
    class, training mode, forward hooks) runs step by step, and a warning says why, once a reason.

    Args:
        unet: its `cross_attention_dim` is the text encoder's `dim`.
        text_encoder: see `fastvdiff.text.TextEncoder`; the empty prompt gives the unconditional embedding.
        scheduler: DDIM, or DDPM for ancestral sampling.
        num_frames, height, width, fps: of the clips that the model was trained on; the defaults of a call.
        cuda_graph: replay the loop where it can be; a call may say otherwise.

    Raises:
        TypeError, ValueError: a part or a size is not as above.
    """

    def __init__(
        self,
        unet: VideoUNet,
        text_encoder: ByteTextEncoder,
        scheduler: DDIMScheduler | DDPMScheduler,
        *,
        num_frames: int,
        height: int,
        width: int,
        fps: float,
        cuda_graph: bool = False,
    ) -> None:
        if unet.config.cross_attention_dim != text_encoder.dim:
            width = f"width {unet.config.cross_attention_dim} (the unet's cross_attention_dim)"
            arguments.fail("text_encoder", width, text_encoder.dim)
        self.unet, self.text_encoder, self.scheduler = unet, text_encoder, scheduler
        self.num_frames = arguments.positive_int("num_frames", num_frames)
        self.height = arguments.positive_int("height", height)
        self.width = arguments.positive_int("width", width)
        self.fps = arguments.number("fps", fps, least=1e-3)
        self.cuda_graph = arguments.flag("cuda_graph", cuda_graph)
        self._graphs = GraphCache()
        self._warned: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        cuda_graph: bool = False,
    ) -> Self:
        """The pipeline that `save_pretrained` wrote, or the one in the package, "tiny".

        Every file is held to its hash first. device: None is the GPU where there is one. dtype: of the weights in
        memory, whatever the files hold. cuda_graph: as in the constructor.

        Raises FileNotFoundError for a name that is neither, `fastvdiff.sealed.DamagedError` (a ValueError) naming a
        file that is missing, truncated or altered, ValueError for a folder of another kind.
        """
        parts = folder.load(folder.find(name))
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        parts["unet"].to(device, dtype)
        parts["text_encoder"].to(device, dtype)
        return cls(**parts, cuda_graph=cuda_graph)

    def save_pretrained(
        self, path: str | Path, *, dtype: torch.dtype | None = None, prompts: dict[str, Any] | None = None
    ) -> None:
        """Write the pipeline as a folder, whole or not at all; the files' hashes go in with it.

        dtype: of the weights on the disk, such as torch.float16; None keeps theirs. prompts: what prompts the model was
        trained on, plain values for the folder's `fastvdiff.json`.
        """
        folder.save(self, Path(path), dtype, prompts or {})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the U-Net and the text encoder; returns the pipeline itself."""
        self.release_graphs()
        for module in (self.unet, self.text_encoder):
            module.to(device=device, dtype=dtype)
        return self

    def release_graphs(self) -> None:
        """Give back the memory of the recorded loops; the next call of a kind records again."""
        self._graphs.clear()

    def reason_against_cuda_graph(self, callback_on_step_end: Callback | None = None) -> str | None:
        """Why a call, with this callback, would run its loop step by step; None if it would be replayed."""
        has_callback = callback_on_step_end is not None
        return reason_against(self.unet, self.scheduler, self._graphs.device_type, has_callback)

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the U-Net's weights, in which it runs; the samples between steps are float32 on a CPU."""
        return self.unet.dtype

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float | Sequence[float] | torch.Tensor = DEFAULT_GUIDANCE,
        *,
        guidance_rescale: float = 0.0,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_videos_per_prompt: int = 1,
        output_type: str = "np",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cuda_graph: bool | None = None,
        progress: bool = True,
        return_dict: bool = True,
    ) -> VideoOutput | tuple[Any]:
        """Sample videos: for P prompts, B = P * num_videos_per_prompt of them, a prompt's videos side by side.

        Args:
            prompt: what to show, one or several.
            negative_prompt: what guidance leads away from; None or "" is the learned unconditional embedding.
            num_inference_steps: denoising steps, at most those of the training schedule.
            guidance_scale: w in u + w (c - u); 1 turns guidance off (and halves the work), 0 ignores the prompt. A list
                has one for each frame.
            guidance_rescale: in [0, 1], pulls the spread of guided predictions back (arXiv:2305.08891, section 3.4).
            eta: 0 for DDIM's deterministic path, 1 for as much noise as DDPM. DDPM schedulers take no eta.
            seed: video i starts from seed + i, or from its own in a list; None draws one. A video is the same (up to
                rounding) in whatever batch it is made.
            generator: torch generators instead of a seed, one for all videos or one for each.
            latents: the noise to start from, (B, C, T, H, W), instead of a drawn one.
            num_frames, height, width: None: as the model was trained.
            num_videos_per_prompt: videos of each prompt.
            output_type: "np" float32 (B, T, H, W, C) in [0, 1]; "pt" float32 (B, C, T, H, W); "pil" lists of images.
            callback_on_step_end: called as in diffusers, (pipeline, i, timestep, tensors) with the tensors named in
                callback_on_step_end_tensor_inputs, "latents" and "prompt_embeds"; those in the dict that it returns
                replace them.
            cuda_graph: replay the loop as one CUDA graph, see the class; None is the pipeline's own setting.
            progress: show a progress bar; with a graph it has one tick, the whole loop.
            return_dict: True: an object with `.frames` and `.seeds`; False: the 1-tuple (frames,).

        Raises:
            ValueError, TypeError: an argument is not as above; the message names it.
        """
        prompts = arguments.prompts(prompt)
        negatives = arguments.negative_prompts(negative_prompt, len(prompts))
        per_prompt = arguments.positive_int("num_videos_per_prompt", num_videos_per_prompt)
        frames = arguments.positive_int("num_frames", self.num_frames if num_frames is None else num_frames)
        height = arguments.positive_int("height", self.height if height is None else height)
        width = arguments.positive_int("width", self.width if width is None else width)
        steps = arguments.steps(num_inference_steps, self.scheduler.config.num_train_timesteps)
        scale = arguments.guidance(guidance_scale, frames, self.device)
        rescale = arguments.number("guidance_rescale", guidance_rescale, 0, 1)
        output_type = arguments.output_type(output_type)
        eta = arguments.number("eta", eta, 0)
        use_graph = self.cuda_graph if cuda_graph is None else arguments.flag("cuda_graph", cuda_graph)
        denoiser = Denoiser.of(self.unet, self.scheduler, steps, eta, rescale)
        videos = len(prompts) * per_prompt
        chosen_seeds, generators = arguments.seeds(seed, generator, videos)
        shape = (videos, self.unet.config.in_channels, frames, height, width)
        sample = arguments.initial_latents(latents, shape, generators, self.device, draw_noise)
        sample = sample.float() * self.scheduler.init_noise_sigma

        guided = isinstance(scale, torch.Tensor) or scale != 1.0
        text, mask = self._encode(prompts, negatives if guided else [], per_prompt)
        callback = _StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        noise = denoiser.draws(sample, generators)
        inputs = LoopInputs(sample, text, mask, scale if guided else None, noise)
        after_step = functools.partial(callback, self) if callback else None
        result = to_frames(self._denoise(denoiser, inputs, after_step, use_graph, progress), output_type)
        return VideoOutput(result, chosen_seeds) if return_dict else (result,)

    def _denoise(
        self, denoiser: Denoiser, inputs: LoopInputs, after_step: AfterStep | None, use_graph: bool, progress: bool
    ) -> torch.Tensor:
        """The samples (B, C, T, H, W) that the loop ends with, replayed if that is wanted and can be."""
        if use_graph:
            against = reason_against(self.unet, self.scheduler, self._graphs.device_type, after_step is not None)
            if against is None:
                with tqdm(total=1, disable=not progress, desc="sampling") as bar:
                    sample = self._graphs.run(denoiser, inputs)
                    bar.update()
                return sample
            self._warn_of(against)
        self._graphs.drop_outdated(self.unet, self.scheduler)
        timesteps = tqdm(denoiser.timesteps, disable=not progress, desc="sampling")
        return denoiser.run(inputs, timesteps, after_step)

    def _warn_of(self, against: str) -> None:
        if against not in self._warned:
            self._warned.add(against)
            message = f"TextToVideoPipeline: cuda_graph: the loop runs step by step: {against}"
            # From inside __call__ and its inference_mode wrapper, up to the caller.
            warnings.warn(message, stacklevel=5)

    def _encode(self, prompts: list[str], negatives: list[str], per_prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Text and mask of all videos, the negative prompts' after the prompts': (B or 2B, L, D) and (B or 2B, L)."""
        text, mask = self.text_encoder([*prompts, *negatives])
        return text.repeat_interleave(per_prompt, 0), mask.repeat_interleave(per_prompt, 0)


class _StepCallback:
    """The caller's function at the end of each step, which may replace the samples or the text."""

    NAMES = ("latents", "prompt_embeds")

    def __init__(self, function: Callback | None, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.NAMES]
        if unknown:
            known = ", ".join(map(repr, self.NAMES))
            arguments.fail("callback_on_step_end_tensor_inputs", f"some of {known}", repr(unknown[0]))
        if function is not None and not callable(function):
            arguments.fail("callback_on_step_end", "a function", type(function).__name__, TypeError)
        self.function, self.names = function, tuple(names)

    def __bool__(self) -> bool:
        return self.function is not None

    def __call__(
        self, pipeline: TextToVideoPipeline, i: int, sample: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = {"latents": sample, "prompt_embeds": text}
        timestep = pipeline.scheduler.timesteps[i]
        replaced = self.function(pipeline, i, timestep, {name: tensors[name] for name in self.names}) or {}
        return replaced.get("latents", sample), replaced.get("prompt_embeds", text)
