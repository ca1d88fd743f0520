"""CUDA graphs of the denoising loop on a GPU: the same bits, new inputs through a replay, no wait inside the loop."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastvdiff.diffusion import DDPMScheduler
from fastvdiff.sampling import TextToVideoPipeline
from fastvdiff.sampling.denoising import Denoiser, LoopInputs
from tests.small_run import FRAMES, small_pipeline

pytestmark = pytest.mark.gpu

PROMPT, OTHER, LONG = "a red circle moving right", "a big star moving upwards", "a red circle that moves left, slowly"
FIXED: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt", "progress": False}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def pipeline(request: pytest.FixtureRequest) -> TextToVideoPipeline:
    return small_pipeline().to("cuda", request.param)


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """A loop that falls back would pass for an equal one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cuda_graph.*")
        yield


def sample(pipeline: TextToVideoPipeline, prompt: Any = PROMPT, cuda_graph: bool = True, **options: Any) -> Any:
    return pipeline(prompt, cuda_graph=cuda_graph, **{**FIXED, "seed": 0, **options}).frames


def equals_the_loop(pipeline: TextToVideoPipeline, *args: Any, **options: Any) -> None:
    """Replayed and step by step give the same bits."""
    replayed = sample(pipeline, *args, **options)
    assert torch.equal(replayed, sample(pipeline, *args, **options, cuda_graph=False))
    assert replayed.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1},
        {"guidance_scale": 7.3},
        {"guidance_scale": [1.1 * (1 + i) for i in range(FRAMES)], "num_videos_per_prompt": 2},
        {"guidance_scale": 3, "guidance_rescale": 0.7},
        {"eta": 1.0},
        {"num_inference_steps": 1, "height": 11, "width": 14, "num_frames": 7},
    ],
    ids=["plain", "guided", "frames", "rescaled", "noisy", "odd"],
)
def test_ddim(pipeline: TextToVideoPipeline, options: dict[str, Any]) -> None:
    equals_the_loop(pipeline, **options)
    equals_the_loop(pipeline, OTHER, **{**options, "seed": 9})
    assert len(pipeline._graphs) == 1


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(pipeline: TextToVideoPipeline, variance: str) -> None:
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, variance_type=variance)
    for seed in (0, 5):
        equals_the_loop(pipeline, seed=seed)
    assert len(pipeline._graphs) == 1


def test_thresholding(pipeline: TextToVideoPipeline) -> None:
    config, kind = pipeline.scheduler.config, type(pipeline.scheduler)
    pipeline.scheduler = kind.from_config(config, thresholding=True, sample_max_value=2)
    for seed in (0, 5):
        equals_the_loop(pipeline, seed=seed, guidance_scale=6)


def test_a_hundred_replays(pipeline: TextToVideoPipeline) -> None:
    """Other prompts, seeds and scales each time; one recording; no memory that grows."""
    memory = []
    for seed in range(100):
        options = {"seed": seed, "guidance_scale": 1.5 + seed / 7, "eta": 0.5}
        equals_the_loop(pipeline, (PROMPT, OTHER)[seed % 2], **options)
        memory.append(torch.cuda.memory_allocated())
    assert len(pipeline._graphs) == 1
    assert memory[10] == memory[-1]


def test_kinds_share_memory_and_not_results(pipeline: TextToVideoPipeline) -> None:
    kinds = [{"num_frames": frames, "prompt": prompt} for frames in (2, 5, 4) for prompt in (PROMPT, LONG)]
    kept = [sample(pipeline, **kind) for kind in kinds]
    copies = [frames.clone() for frames in kept]
    for kind in [*kinds, *reversed(kinds)]:
        equals_the_loop(pipeline, **{"seed": 3, **kind})
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert len(pipeline._graphs) == 4


def test_released_memory(pipeline: TextToVideoPipeline) -> None:
    sample(pipeline, cuda_graph=False)
    sample(pipeline, num_frames=9)
    pipeline.release_graphs()
    gc.collect()
    before = torch.cuda.memory_allocated()
    sample(pipeline, num_frames=9)
    assert torch.cuda.memory_allocated() > before
    pipeline.release_graphs()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_weights_in_place_and_elsewhere(pipeline: TextToVideoPipeline) -> None:
    sample(pipeline)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(1.5)
    equals_the_loop(pipeline)
    weight = pipeline.unet.conv_out.weight
    weight.data = weight.data * 2
    equals_the_loop(pipeline)
    assert len(pipeline._graphs) == 1


def test_calls_from_several_streams(pipeline: TextToVideoPipeline) -> None:
    expected = [sample(pipeline, seed=seed, cuda_graph=False) for seed in range(6)]
    sample(pipeline)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for seed in range(6):
        streams[seed % 3].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(streams[seed % 3]):
            results.append(sample(pipeline, seed=seed))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_nothing_in_the_loop_waits(pipeline: TextToVideoPipeline, eta: float) -> None:
    denoiser = Denoiser.of(pipeline.unet, pipeline.scheduler, 4, eta, 0.0)
    start = torch.randn(1, 3, FRAMES, 8, 8, device="cuda")
    with torch.inference_mode():
        text, mask = pipeline.text_encoder([PROMPT, ""])
        noise = [torch.randn_like(start) for timestep in denoiser.timesteps if denoiser.adds_noise(timestep)]
        inputs = LoopInputs(start, text, mask, torch.tensor(2.0, device="cuda"), noise)
        denoiser.run(inputs)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            denoiser.run(inputs)
            denoiser.run(inputs._replace(scale=2.0))
        finally:
            torch.cuda.set_sync_debug_mode(before)


def test_a_forbidden_operation_comes_with_advice(
    pipeline: TextToVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Denoiser.step
    monkeypatch.setattr(Denoiser, "step", lambda self, *args: step(self, *args) * float(args[1].sum().item() * 0 + 1))
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError) as raised:
        sample(pipeline)
    assert "set_sync_debug_mode('error')" in raised.value.__notes__[0]
    assert torch.cuda.current_stream() == stream
    monkeypatch.undo()
    equals_the_loop(pipeline)
