"""Denoising loops as CUDA graphs: recorded once for each kind of call, then replayed by a single launch.

A recording holds every launch of every step: the U-Net, guidance and the scheduler. It reads its inputs from tensors
of its own, which each call fills before the replay, and the weights from where they were: weights that change in place
change the result, weights that move make every recording useless, and `GraphCache` drops them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fastvdiff import dispatch
from fastvdiff.diffusion import DDIMScheduler, DDPMScheduler

from .denoising import Denoiser, LoopInputs

# A recording keeps one set of inputs and of noise; all of them share the memory of one U-Net evaluation.
MAX_GRAPHS = 4

_ADVICE = (
    "TextToVideoPipeline: the denoising loop could not be recorded as a CUDA graph. cuda_graph=False runs it step by "
    "step; torch.cuda.set_sync_debug_mode('error') then stops it at an operation that a capture forbids."
)

Work = Callable[[], torch.Tensor]


class Recording(Protocol):
    """Recorded work: `replay` does it again, on the tensors it was recorded with, and leaves its result in `output`."""

    output: torch.Tensor

    def replay(self) -> None:
        """Do the work again."""
        ...


class Recorder(Protocol):
    """Makes recordings on one kind of device, and keeps those that share memory from running side by side."""

    device_type: str

    def __init__(self, device: torch.device) -> None: ...

    def record(self, warm_up: Work, work: Work, beside: Any) -> Recording:
        """Run `warm_up`, then record `work`; `beside` is an earlier recording to share memory with, or None."""
        ...

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Around the copies in, the replay and the copy out of one call."""
        ...


@contextlib.contextmanager
def advising() -> Iterator[None]:
    """Add to a failed capture's error what to do about it."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(_ADVICE)
        raise


@dataclass(frozen=True)
class CudaRecording:
    """A CUDA graph and the tensor it writes."""

    graph: torch.cuda.CUDAGraph
    output: torch.Tensor

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self.graph.replay()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all recordings on a device: libraries keep a workspace for every stream they have seen."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Records on a stream of its own; calls from different streams take turns on the recordings' memory."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _capture_stream(device)
        self._free = torch.cuda.Event()

    def record(self, warm_up: Work, work: Work, beside: CudaRecording | None) -> CudaRecording:
        """See `Recorder`; kernels are compiled, and libraries load and choose theirs, in the warm-up."""
        graph = torch.cuda.CUDAGraph()
        pool = None if beside is None else beside.graph.pool()
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        # Left by itself: when a capture fails, torch.cuda.graph does not restore the stream.
        with torch.cuda.stream(self._stream):
            warm_up()
            # Other threads, a data loader's for one, may use the device meanwhile.
            with (
                advising(),
                torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                output = work()
        caller.wait_stream(self._stream)
        return CudaRecording(graph, output)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """See `Recorder`; the device waits, not the host."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._free)
        yield
        self._free.record(stream)


class CapturedLoop:
    """One denoising loop as a recording, with the inputs it reads.

    Args:
        denoiser: the loop.
        inputs: of a first call; every later one has the same shapes, dtypes and kind of guidance.
    """

    def __init__(self, denoiser: Denoiser, inputs: LoopInputs) -> None:
        self.recording: Recording | None = None
        self._denoiser = denoiser
        scale, noisy = inputs.scale, sum(map(denoiser.adds_noise, denoiser.timesteps))
        if scale is not None:
            shape = scale.shape if isinstance(scale, torch.Tensor) else ()
            scale = torch.empty(shape, dtype=torch.float32, device=inputs.sample.device)
        self._inputs = LoopInputs(
            torch.empty_like(inputs.sample, memory_format=torch.contiguous_format),
            torch.empty_like(inputs.text, memory_format=torch.contiguous_format),
            torch.empty_like(inputs.mask, memory_format=torch.contiguous_format),
            scale,
            [torch.empty_like(inputs.sample, memory_format=torch.contiguous_format) for _ in range(noisy)],
        )

    def __call__(self, inputs: LoopInputs, recorder: Recorder, beside: Recording | None) -> torch.Tensor:
        """Denoise: the first call records. Returns samples (B, C, T, H, W) that no later call writes to."""
        with recorder.turn():
            self._fill(inputs)
            if self.recording is None:
                self.recording = recorder.record(self._warm_up, self._work, beside)
            self.recording.replay()
            return self.recording.output.clone()

    def _fill(self, inputs: LoopInputs) -> None:
        own = self._inputs
        for name in ("sample", "text", "mask"):
            getattr(own, name).copy_(getattr(inputs, name))
        if isinstance(inputs.scale, torch.Tensor):
            own.scale.copy_(inputs.scale)
        elif inputs.scale is not None:
            own.scale.fill_(inputs.scale)
        for target, drawn in zip(own.noise, inputs.noise, strict=True):
            target.copy_(drawn)

    def _warm_up(self) -> torch.Tensor:
        """The first step and the last: all others launch what one of the two does."""
        timesteps = self._denoiser.timesteps
        return self._denoiser.run(self._inputs, timesteps=dict.fromkeys((timesteps[0], timesteps[-1])))

    def _work(self) -> torch.Tensor:
        return self._denoiser.run(self._inputs)


class GraphCache:
    """The recordings of a pipeline, at most `capacity` of them: the one used longest ago goes first.

    Args:
        recorder: what makes a recorder for a device.
        capacity: of different kinds of calls, see `loop_key`.
    """

    def __init__(self, recorder: type[Recorder] = CudaRecorder, capacity: int = MAX_GRAPHS) -> None:
        self._make_recorder, self._capacity = recorder, capacity
        self.device_type = recorder.device_type
        self.clear()

    def __len__(self) -> int:
        return len(self._loops)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or unpickled pipeline records its own: graphs know only the weights they were recorded with.
        return type(self), (self._make_recorder, self._capacity)

    def clear(self) -> None:
        """Drop every recording and its memory."""
        self._loops: dict[Hashable, CapturedLoop] = {}
        self._recorder: Recorder | None = None
        self._weights: tuple[Any, ...] = ()

    def drop_outdated(self, unet: nn.Module, scheduler: object) -> None:
        """Drop the recordings if the U-Net, one of its tensors' places or the scheduler is no longer theirs."""
        if self._loops and self._weights != _identity(unet, scheduler):
            self.clear()

    def run(self, denoiser: Denoiser, inputs: LoopInputs) -> torch.Tensor:
        """Denoise by a replay, after recording the loop if no call of its kind was recorded yet.

        Returns the samples, bitwise those of `denoiser.run(inputs)`. Raises what the loop or the recording raises.
        """
        self.drop_outdated(denoiser.unet, denoiser.scheduler)
        if not self._loops:
            self._recorder = self._make_recorder(inputs.sample.device)
            self._weights = _identity(denoiser.unet, denoiser.scheduler)
        key = loop_key(denoiser, inputs)
        beside = next((loop.recording for loop in self._loops.values()), None)
        loop = self._loops.pop(key, None) or CapturedLoop(denoiser, inputs)
        sample = loop(inputs, self._recorder, beside)
        self._loops[key] = loop
        if len(self._loops) > self._capacity:
            del self._loops[next(iter(self._loops))]
        return sample


def reason_against(unet: nn.Module, scheduler: object, device_type: str, has_callback: bool) -> str | None:
    """Why a loop cannot be replayed, in a sentence, or None.

    device_type: what the recorder records on. has_callback: whether the caller's function runs after each step.
    """
    if unet.device.type != device_type:
        return f"the U-Net is on {unet.device}, and only a CUDA device has graphs"
    if has_callback:
        return "callback_on_step_end is code of the host between the steps, which a replay leaves out"
    if type(scheduler) not in (DDIMScheduler, DDPMScheduler):
        # A step may keep something from one call to the next, which would be that of the recording for ever.
        return f"the scheduler is a {type(scheduler).__name__}; a DDIMScheduler's and a DDPMScheduler's steps are known"
    for name, module in unet.named_modules():
        if module.training:
            return f"{_named(name)} is in training mode; call unet.eval()"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{_named(name)} has forward hooks, code of the host that a replay leaves out"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "global forward hooks are registered, code of the host that a replay leaves out"
    return None


def _named(name: str) -> str:
    return f"the U-Net's {name}" if name else "the U-Net"


def loop_key(denoiser: Denoiser, inputs: LoopInputs) -> Hashable:
    """What a recording has of its call for ever: sizes, numbers computed on the host, and the choice of kernels."""
    scale, scheduler = inputs.scale, denoiser.scheduler
    return (
        tuple(inputs.sample.shape),
        tuple(inputs.text.shape),
        inputs.text.dtype,
        tuple(scale.shape) if isinstance(scale, torch.Tensor) else scale is not None,
        tuple(denoiser.timesteps),
        tuple(scheduler.alphas_at(timestep, inputs.sample.device) for timestep in denoiser.timesteps),
        repr(scheduler.config),
        tuple(denoiser.options.items()),
        denoiser.rescale,
        tuple(sorted(dispatch.wishes().items())),
        _numerics(inputs.sample.device.type),
    )


def _numerics(device_type: str) -> tuple[Hashable, ...]:
    """Settings of torch's that choose among its kernels."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        cuda.matmul.fp32_precision,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled()),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
    )


def _identity(unet: nn.Module, scheduler: object) -> tuple[Any, ...]:
    """The objects of a recording, and where each of the U-Net's tensors is; it keeps them alive as long as itself."""
    tensors = [*unet.parameters(), *unet.buffers()]
    return unet, scheduler, tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)
