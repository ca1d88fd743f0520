"""Denoising loops as graphs, on a tape that stands for one: equal results, what is recorded when, what drops it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastvdiff import use_impl
from fastvdiff.diffusion import DDIMScheduler, DDPMScheduler
from fastvdiff.sampling import TextToVideoPipeline
from fastvdiff.sampling.denoising import Denoiser, LoopInputs
from fastvdiff.sampling.graph_capture import CudaRecorder, GraphCache, advising
from tests.sampling.tape import TapeRecorder, TapeRecording
from tests.small_run import FRAMES, small_pipeline

PROMPT, OTHER, LONG = "a red circle moving right", "a big star moving upwards", "a red circle that moves left, slowly"
FIXED: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt", "progress": False}


@pytest.fixture
def pipeline() -> TextToVideoPipeline:
    return taped(small_pipeline())


def taped(pipeline: TextToVideoPipeline, capacity: int = 4) -> TextToVideoPipeline:
    """The pipeline, replaying on a CPU."""
    pipeline.cuda_graph = True
    pipeline._graphs = GraphCache(TapeRecorder, capacity)
    return pipeline


def sample(pipeline: TextToVideoPipeline, prompt: Any = PROMPT, **options: Any) -> torch.Tensor:
    if "generator" not in options:
        options = {"seed": 0, **options}
    return pipeline(prompt, **{**FIXED, **options}).frames


def equals_the_loop(pipeline: TextToVideoPipeline, *args: Any, **options: Any) -> None:
    """Replayed and step by step give the same bits."""
    assert torch.equal(sample(pipeline, *args, **options), sample(pipeline, *args, cuda_graph=False, **options))


def recordings(pipeline: TextToVideoPipeline) -> list[TapeRecording]:
    return [loop.recording for loop in pipeline._graphs._loops.values()]


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """A loop that falls back would pass for an equal one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cuda_graph.*")
        yield


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"guidance_scale": 1},
    "guided": {"guidance_scale": 7.3},
    "frames": {"guidance_scale": [1.1 * (1 + i) for i in range(FRAMES)]},
    "rescaled": {"guidance_scale": 3, "guidance_rescale": 0.7},
    "noisy": {"eta": 1.0},
    "slightly noisy": {"eta": 0.3, "num_videos_per_prompt": 2},
    "one step": {"num_inference_steps": 1},
}


class TestResults:
    """Bitwise those of the ordinary loop."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_ddim(self, pipeline: TextToVideoPipeline, kind: str) -> None:
        equals_the_loop(pipeline, **KINDS[kind])
        equals_the_loop(pipeline, OTHER, **{**KINDS[kind], "seed": 9})
        equals_the_loop(pipeline, negative_prompt="a dull grey square", **{**KINDS[kind], "seed": 10})
        assert len(pipeline._graphs) == 1

    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
    def test_ddpm(self, pipeline: TextToVideoPipeline, variance: str) -> None:
        config = pipeline.scheduler.config
        pipeline.scheduler = DDPMScheduler.from_config(config, variance_type=variance, timestep_spacing="leading")
        for seed in (0, 5):
            equals_the_loop(pipeline, seed=seed)
        assert len(pipeline._graphs) == 1

    def test_thresholding(self, pipeline: TextToVideoPipeline) -> None:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, thresholding=True, sample_max_value=2)
        for seed in (0, 5):
            equals_the_loop(pipeline, seed=seed, guidance_scale=6)

    def test_generators_go_as_far(self, pipeline: TextToVideoPipeline) -> None:
        states = []
        for graph in (True, True, False):
            generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
            frames = sample(pipeline, [PROMPT, OTHER], generator=generators, eta=1.0, cuda_graph=graph)
            states.append((frames, *(generator.get_state() for generator in generators)))
        assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*states, strict=True))

    def test_latents(self, pipeline: TextToVideoPipeline) -> None:
        latents = torch.randn(1, FRAMES, 3, 8, 8).transpose(1, 2)
        before = latents.clone()
        equals_the_loop(pipeline, latents=latents)
        assert torch.equal(latents, before)

    def test_earlier_results_stay(self, pipeline: TextToVideoPipeline) -> None:
        first = sample(pipeline, seed=1)
        kept = first.clone()
        sample(pipeline, seed=2)
        sample(pipeline, num_frames=2)
        assert torch.equal(first, kept)

    def test_samples_are_copied_out(self, pipeline: TextToVideoPipeline) -> None:
        denoiser = Denoiser.of(pipeline.unet, pipeline.scheduler, 2, 0.0, 0.0)
        with torch.inference_mode():
            text, mask = pipeline.text_encoder([PROMPT])
            starts = torch.randn(2, 1, 3, FRAMES, 8, 8)
            got = [pipeline._graphs.run(denoiser, LoopInputs(start, text, mask, None, [])) for start in starts]
            expected = [denoiser.run(LoopInputs(start, text, mask, None, [])) for start in starts]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_a_replay_leaves_its_inputs_alone(self, pipeline: TextToVideoPipeline) -> None:
        first = sample(pipeline, eta=1.0)
        (loop,) = pipeline._graphs._loops.values()
        with torch.inference_mode():
            loop.recording.replay()
            again = loop.recording.output.clone()
            loop.recording.replay()
        assert torch.equal(loop.recording.output, again)
        assert torch.equal(sample(pipeline, eta=1.0), first)

    def test_many_replays(self, pipeline: TextToVideoPipeline) -> None:
        for seed in range(20):
            options = {"seed": seed, "guidance_scale": 1.5 + seed / 7, "eta": 0.5, "num_inference_steps": 2}
            equals_the_loop(pipeline, (PROMPT, OTHER)[seed % 2], **options)
        (recording,) = recordings(pipeline)
        assert recording.replays == 20


class TestKeys:
    """What makes a call one of another kind."""

    def test_recorded_once(self, pipeline: TextToVideoPipeline) -> None:
        sample(pipeline)
        (recording,) = recordings(pipeline)
        sample(pipeline, OTHER, seed=4, guidance_scale=9, negative_prompt="dull")
        sample(pipeline, progress=True, output_type="np")
        assert recordings(pipeline) == [recording]
        assert recording.replays == 3
        assert pipeline._graphs._recorder.turns == 3

    @pytest.mark.parametrize(
        "change",
        [
            {"num_inference_steps": 2},
            {"num_frames": 3},
            {"height": 9},
            {"num_videos_per_prompt": 2},
            {"eta": 0.5},
            {"guidance_scale": 1},
            {"guidance_scale": [2.0] * FRAMES},
            {"guidance_rescale": 0.5},
            {"prompt": LONG},
        ],
        ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items())[:30],
    )
    def test_other_kinds(self, pipeline: TextToVideoPipeline, change: dict[str, Any]) -> None:
        sample(pipeline)
        equals_the_loop(pipeline, **{"seed": 3, **change})
        assert len(pipeline._graphs) == 2
        equals_the_loop(pipeline)
        assert [recording.replays for recording in recordings(pipeline)] == [1, 2]

    def test_implementations_and_settings(self, pipeline: TextToVideoPipeline) -> None:
        sample(pipeline)
        with use_impl("reference"):
            equals_the_loop(pipeline)
        assert len(pipeline._graphs) == 2
        torch.use_deterministic_algorithms(True)
        try:
            sample(pipeline)
        finally:
            torch.use_deterministic_algorithms(False)
        assert len(pipeline._graphs) == 3
        with torch.autocast("cpu", torch.bfloat16):
            equals_the_loop(pipeline)
        assert len(pipeline._graphs) == 4

    def test_the_least_recently_used_goes(self) -> None:
        pipeline = taped(small_pipeline(), capacity=2)
        sample(pipeline, num_frames=1)
        sample(pipeline, num_frames=2)
        one, two = recordings(pipeline)
        sample(pipeline, num_frames=1)
        sample(pipeline, num_frames=3)
        assert recordings(pipeline)[0] is one
        assert two not in recordings(pipeline)
        equals_the_loop(pipeline, num_frames=2)
        assert len(pipeline._graphs) == 2


class TestDropping:
    """A recording is of these weights and this scheduler."""

    def test_weights_in_place(self, pipeline: TextToVideoPipeline) -> None:
        before = sample(pipeline)
        with torch.no_grad():
            for parameter in pipeline.unet.parameters():
                parameter.mul_(1.1)
        pipeline.unet.load_state_dict({k: v * 1.1 for k, v in pipeline.unet.state_dict().items()})
        equals_the_loop(pipeline)
        assert [recording.replays for recording in recordings(pipeline)] == [2]
        assert not torch.equal(sample(pipeline), before)

    def test_weights_elsewhere(self, pipeline: TextToVideoPipeline) -> None:
        sample(pipeline)
        sample(pipeline, num_frames=2)
        weight = pipeline.unet.conv_out.weight
        weight.data = weight.data * 2
        equals_the_loop(pipeline)
        assert len(pipeline._graphs) == 1

    def test_another_network(self, pipeline: TextToVideoPipeline) -> None:
        sample(pipeline)
        pipeline.unet = small_pipeline(seed=1).unet
        equals_the_loop(pipeline)
        assert len(pipeline._graphs) == 1

    def test_another_scheduler(self, pipeline: TextToVideoPipeline) -> None:
        sample(pipeline)
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        equals_the_loop(pipeline)
        assert len(pipeline._graphs) == 1

    def test_an_ordinary_call_drops_too(self, pipeline: TextToVideoPipeline) -> None:
        sample(pipeline)
        pipeline.unet = small_pipeline(seed=1).unet
        sample(pipeline, cuda_graph=False)
        assert len(pipeline._graphs) == 0

    def test_to_and_release(self, pipeline: TextToVideoPipeline) -> None:
        sample(pipeline)
        pipeline.to(dtype=torch.bfloat16)
        assert len(pipeline._graphs) == 0
        equals_the_loop(pipeline)
        pipeline.release_graphs()
        assert len(pipeline._graphs) == 0

    def test_the_schedule_itself(self, pipeline: TextToVideoPipeline) -> None:
        sample(pipeline)
        pipeline.scheduler.alphas_cumprod = pipeline.scheduler.alphas_cumprod**1.5
        equals_the_loop(pipeline)

    def test_copies_record_their_own(self, pipeline: TextToVideoPipeline) -> None:
        sample(pipeline)
        for copied in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
            assert len(copied._graphs) == 0
            equals_the_loop(copied)
        assert len(pipeline._graphs) == 1


class TestFallingBack:
    """The ordinary loop runs, and a warning says why, once a reason."""

    def falls_back(self, pipeline: TextToVideoPipeline, reason: str, **options: Any) -> None:
        expected = sample(pipeline, **{**options, "cuda_graph": False})
        with pytest.warns(UserWarning, match=f"cuda_graph: the loop runs step by step: {reason}") as caught:
            assert torch.equal(sample(pipeline, cuda_graph=True, **options), expected)
        assert [warning.filename for warning in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sample(pipeline, cuda_graph=True, **options)
        assert len(pipeline._graphs) == 0

    def test_no_cuda_device(self) -> None:
        pipeline = small_pipeline()
        assert pipeline.reason_against_cuda_graph() == "the U-Net is on cpu, and only a CUDA device has graphs"
        self.falls_back(pipeline, "the U-Net is on cpu")

    def test_callback(self, pipeline: TextToVideoPipeline) -> None:
        def black(pipe: Any, i: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"latents": torch.zeros_like(tensors["latents"])}

        assert pipeline.reason_against_cuda_graph() is None
        assert "callback_on_step_end" in pipeline.reason_against_cuda_graph(black)
        self.falls_back(pipeline, "callback_on_step_end is code of the host", callback_on_step_end=black)

    def test_scheduler(self, pipeline: TextToVideoPipeline) -> None:
        class Remembering(DDIMScheduler):
            pass

        pipeline.scheduler = Remembering.from_config(pipeline.scheduler.config)
        self.falls_back(pipeline, "the scheduler is a Remembering; a DDIMScheduler's and a DDPMScheduler's")

    def test_training(self, pipeline: TextToVideoPipeline) -> None:
        pipeline.unet.middle["block0"].resnet.dropout.train()
        self.falls_back(pipeline, r"the U-Net's middle\.block0\.resnet\.dropout is in training mode")
        pipeline.unet.train()
        self.falls_back(pipeline, "the U-Net is in training mode; call unet.eval()")

    def test_hooks(self, pipeline: TextToVideoPipeline) -> None:
        handle = pipeline.unet.conv_in.register_forward_hook(lambda module, args, output: None)
        self.falls_back(pipeline, "the U-Net's conv_in has forward hooks")
        handle.remove()
        handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
        try:
            self.falls_back(pipeline, "global forward hooks are registered")
        finally:
            handle.remove()
        equals_the_loop(pipeline)

    def test_the_argument(self, pipeline: TextToVideoPipeline) -> None:
        with pytest.raises(TypeError, match=r"cuda_graph: expected True or False, got 1 \(int\)"):
            sample(pipeline, cuda_graph=1)
        parts = (pipeline.unet, pipeline.text_encoder, pipeline.scheduler)
        sizes: dict[str, Any] = {"num_frames": 4, "height": 8, "width": 8, "fps": 8}
        with pytest.raises(TypeError, match="cuda_graph: expected True or False, got 'yes'"):
            TextToVideoPipeline(*parts, **sizes, cuda_graph="yes")
        assert TextToVideoPipeline(*parts, **sizes, cuda_graph=True).cuda_graph


class TestErrors:
    """They reach the caller as they are, and leave nothing half recorded."""

    def test_in_a_recording(self, pipeline: TextToVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any) -> None:
            raise RuntimeError("out of paper")

        monkeypatch.setattr(TapeRecorder, "record", fail)
        with pytest.raises(RuntimeError, match="out of paper"):
            sample(pipeline)
        assert len(pipeline._graphs) == 0
        monkeypatch.undo()
        equals_the_loop(pipeline)

    def test_in_a_replay(self, pipeline: TextToVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: TapeRecording) -> None:
            raise RuntimeError("torn")

        sample(pipeline)
        monkeypatch.setattr(TapeRecording, "replay", fail)
        with pytest.raises(RuntimeError, match="torn"):
            sample(pipeline)
        monkeypatch.undo()
        equals_the_loop(pipeline)

    def test_a_failed_capture_comes_with_advice(self) -> None:
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing") as raised, advising():
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        assert "set_sync_debug_mode('error')" in raised.value.__notes__[0]


def test_the_device_of_graphs() -> None:
    assert GraphCache().device_type == CudaRecorder.device_type == "cuda"
