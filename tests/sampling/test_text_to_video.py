"""The text-to-video pipeline: what it returns, what its seeds promise, what guidance means, what it refuses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvdiff.diffusion import DDIMScheduler, DDPMScheduler
from fastvdiff.sampling import TextToVideoPipeline, VideoOutput, folder, to_frames
from fastvdiff.sealed import DamagedError
from tests.small_run import FRAMES, SIZE, small_pipeline

PROMPT, OTHER = "a red circle moving right", "a blue star moving up"


@pytest.fixture(scope="module")
def pipeline() -> TextToVideoPipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "small"
    small_pipeline().save_pretrained(path, prompts={"examples": [PROMPT]})
    return path


def sample(pipeline: TextToVideoPipeline, prompt: Any = PROMPT, **options: Any) -> torch.Tensor:
    """Frames (B, C, T, H, W) of three steps from seed 0, unless options say otherwise."""
    if "generator" not in options:
        options = {"seed": 0, **options}
    options = {"num_inference_steps": 3, "output_type": "pt", "progress": False, **options}
    return pipeline(prompt, **options).frames


def test_output_types(pipeline: TextToVideoPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "progress": False}
    tensor = pipeline([PROMPT, OTHER], output_type="pt", **options).frames
    assert (tensor.shape, tensor.dtype) == ((2, 3, FRAMES, SIZE, SIZE), torch.float32)
    assert 0 <= tensor.min() < tensor.max() <= 1
    array = pipeline([PROMPT, OTHER], **options).frames
    assert (array.shape, array.dtype) == ((2, FRAMES, SIZE, SIZE, 3), np.float32)
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 4, 1).numpy())
    images = pipeline([PROMPT, OTHER], output_type="pil", **options).frames
    assert (len(images), len(images[0]), images[0][0].size) == (2, FRAMES, (SIZE, SIZE))
    assert np.abs(np.asarray(images[1][2]) / 255 - array[1, 2]).max() <= 0.5 / 255 + 1e-6
    (only,) = pipeline([PROMPT, OTHER], return_dict=False, **options)
    np.testing.assert_array_equal(only, array)


def test_frames_are_clamped() -> None:
    ends = to_frames(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 1, 5), "pt")
    assert ends.flatten().tolist() == [0, 0, 0.5, 1, 1]


def test_the_same_seed_gives_the_same_video(pipeline: TextToVideoPipeline) -> None:
    for eta in (0.0, 1.0):
        first = sample(pipeline, seed=5, eta=eta)
        torch.manual_seed(99)
        assert torch.equal(first, sample(pipeline, seed=5, eta=eta))
        assert not torch.equal(first, sample(pipeline, seed=6, eta=eta))


def test_a_drawn_seed_is_reported(pipeline: TextToVideoPipeline) -> None:
    state = torch.get_rng_state()
    output = pipeline(PROMPT, num_inference_steps=2, progress=False, output_type="pt")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(output, VideoOutput)
    assert torch.equal(output.frames, sample(pipeline, seed=output.seeds[0], num_inference_steps=2))
    assert pipeline(PROMPT, num_inference_steps=1, progress=False).seeds != output.seeds


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_video_does_not_depend_on_its_batch(pipeline: TextToVideoPipeline, eta: float) -> None:
    together = sample(pipeline, [PROMPT, OTHER], seed=10, eta=eta, num_videos_per_prompt=2)
    assert pipeline([PROMPT, OTHER], num_inference_steps=1, seed=10, progress=False).seeds == [10, 11]
    for index, (prompt, seed) in enumerate([(PROMPT, 10), (PROMPT, 11), (OTHER, 12), (OTHER, 13)]):
        alone = sample(pipeline, prompt, seed=seed, eta=eta)
        torch.testing.assert_close(together[index], alone[0], atol=2e-5, rtol=0)
    chosen = sample(pipeline, [OTHER, PROMPT], seed=[13, 10], eta=eta)
    torch.testing.assert_close(chosen, together[[3, 0]], atol=2e-5, rtol=0)


def test_generators_and_latents(pipeline: TextToVideoPipeline) -> None:
    seeded = sample(pipeline, seed=4)
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(sample(pipeline, generator=generator), seeded)
    assert pipeline(PROMPT, num_inference_steps=1, generator=generator, progress=False).seeds is None
    noise = torch.randn(1, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    assert torch.equal(sample(pipeline, latents=noise), seeded)


def test_guidance_is_what_the_formula_says(pipeline: TextToVideoPipeline) -> None:
    """u + w (c - u): w = 1 is the conditional model, w = 0 the unconditional one, a list goes frame by frame."""
    conditional, unconditional = sample(pipeline, guidance_scale=1), sample(pipeline, guidance_scale=0)
    assert not torch.allclose(conditional, unconditional)
    torch.testing.assert_close(unconditional, sample(pipeline, OTHER, guidance_scale=0), atol=2e-5, rtol=0)
    torch.testing.assert_close(
        conditional, sample(pipeline, OTHER, negative_prompt=PROMPT, guidance_scale=0), atol=2e-5, rtol=0
    )
    strong = sample(pipeline, guidance_scale=4)
    torch.testing.assert_close(strong, sample(pipeline, guidance_scale=[4] * FRAMES), atol=2e-5, rtol=0)
    torch.testing.assert_close(strong, sample(pipeline, guidance_scale=torch.tensor(4.0)), atol=0, rtol=0)
    assert torch.equal(strong, sample(pipeline, guidance_scale=4, negative_prompt=""))
    assert not torch.equal(strong, sample(pipeline, guidance_scale=4, negative_prompt=OTHER))
    assert not torch.equal(strong, sample(pipeline, guidance_scale=4, guidance_rescale=0.7))


def test_one_step_against_plain_arithmetic(pipeline: TextToVideoPipeline) -> None:
    noise = torch.randn(1, 3, FRAMES, SIZE, SIZE)
    t, a = 999, float(pipeline.scheduler.alphas_cumprod[999])
    with torch.no_grad():
        text, mask = pipeline.text_encoder([PROMPT, ""])
        c, u = pipeline.unet(torch.cat([noise, noise]), t, text, encoder_attention_mask=mask).chunk(2)
    v = u + 2.5 * (c - u)
    original = (a**0.5 * noise - (1 - a) ** 0.5 * v).clamp(-1, 1)
    got = sample(pipeline, latents=noise, num_inference_steps=1, guidance_scale=2.5)
    torch.testing.assert_close(got, (original + 1) / 2, atol=1e-5, rtol=0)


def test_sizes_other_than_trained(pipeline: TextToVideoPipeline) -> None:
    assert sample(pipeline, num_frames=7, height=11, width=14).shape == (1, 3, 7, 11, 14)
    assert sample(pipeline, num_frames=1).shape == (1, 3, 1, SIZE, SIZE)


def test_callback_sees_and_replaces(pipeline: TextToVideoPipeline) -> None:
    seen: list[tuple[int, int, list[str]]] = []

    def look(pipe: TextToVideoPipeline, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        assert pipe is pipeline
        seen.append((i, int(t), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 2 else {}

    names = ("latents", "prompt_embeds")
    black = sample(pipeline, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert seen == [(i, t, sorted(names)) for i, t in enumerate((999, 666, 332))]
    assert torch.equal(black, torch.full_like(black, 0.5))
    with pytest.raises(ValueError, match="expected some of 'latents', 'prompt_embeds', got 'x'"):
        sample(pipeline, callback_on_step_end=look, callback_on_step_end_tensor_inputs=("x",))
    with pytest.raises(TypeError, match="callback_on_step_end: expected a function, got int"):
        sample(pipeline, callback_on_step_end=3)


def test_ddpm_scheduler(pipeline: TextToVideoPipeline) -> None:
    ancestral = small_pipeline()
    ancestral.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    ancestral = TextToVideoPipeline(
        ancestral.unet, ancestral.text_encoder, ancestral.scheduler,
        num_frames=FRAMES, height=SIZE, width=SIZE, fps=8,
    )  # fmt: skip
    assert torch.equal(sample(ancestral, seed=1), sample(ancestral, seed=1))
    assert not torch.equal(sample(ancestral, seed=1), sample(ancestral, seed=2))
    with pytest.raises(ValueError, match=r"eta: expected 0, as DDPMScheduler has no eta, got 0.5"):
        sample(ancestral, eta=0.5)


def test_no_gradient_is_recorded(pipeline: TextToVideoPipeline) -> None:
    def look(pipe: Any, i: int, t: Any, tensors: dict[str, torch.Tensor]) -> None:
        assert tensors["latents"].is_inference()

    sample(pipeline, callback_on_step_end=look)


REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ("", {}, ValueError, "prompt: expected some text, got an empty prompt at position 0"),
    ([PROMPT, " "], {}, ValueError, "prompt: expected some text, got an empty prompt at position 1"),
    ([], {}, ValueError, "prompt: expected at least one prompt, got an empty list"),
    (3, {}, TypeError, "prompt: expected a str or a list of str, got 3 (int)"),
    ([PROMPT, None], {}, TypeError, "prompt: expected a str or a list of str"),
    (PROMPT, {"negative_prompt": 3}, TypeError, "negative_prompt: expected a str, a list of str or None, got 3 (int)"),
    (PROMPT, {"negative_prompt": ["a", "b"]}, ValueError, "negative_prompt: expected as many as there are prompts (1)"),
    (PROMPT, {"num_inference_steps": 0}, ValueError, "num_inference_steps: expected at least 1, got 0"),
    (PROMPT, {"num_inference_steps": 2.0}, TypeError, "num_inference_steps: expected an int, got 2.0 (float)"),
    (PROMPT, {"num_inference_steps": 1001}, ValueError, "num_inference_steps: expected at most 1000"),
    (PROMPT, {"guidance_scale": -1}, ValueError, "guidance_scale: expected at least 0, got -1"),
    (PROMPT, {"guidance_scale": float("nan")}, TypeError, "guidance_scale: expected a finite number at least 0"),
    (PROMPT, {"guidance_scale": "high"}, TypeError, "guidance_scale: expected a finite number at least 0, got 'high'"),
    (PROMPT, {"guidance_scale": [1, 2]}, ValueError, "guidance_scale: expected a number, or one for each of the 4"),
    (PROMPT, {"guidance_rescale": 1.5}, ValueError, "guidance_rescale: expected from 0 to 1, got 1.5"),
    (PROMPT, {"eta": -0.1}, ValueError, "eta: expected at least 0, got -0.1"),
    (PROMPT, {"seed": -1}, ValueError, "seed: expected 0 to 9223372036854775807, got -1"),
    (PROMPT, {"seed": 1.5}, TypeError, "seed: expected an int or a list of ints, got 1.5 (float)"),
    (PROMPT, {"seed": [1, 2]}, ValueError, "seed: expected an int, or one for each of the 1 videos, got 2 ints"),
    (PROMPT, {"seed": 1, "generator": torch.Generator()}, ValueError, "seed: expected None, as a generator is given"),
    (PROMPT, {"generator": 3}, TypeError, "generator: expected a torch.Generator or a list of them, got int"),
    (PROMPT, {"generator": []}, ValueError, "generator: expected one, or one for each of the 1 videos, got 0"),
    (PROMPT, {"num_frames": 0}, ValueError, "num_frames: expected at least 1, got 0"),
    (PROMPT, {"height": -8}, ValueError, "height: expected at least 1, got -8"),
    (PROMPT, {"width": "8"}, TypeError, "width: expected an int, got '8' (str)"),
    (PROMPT, {"num_videos_per_prompt": 0}, ValueError, "num_videos_per_prompt: expected at least 1, got 0"),
    (PROMPT, {"output_type": "mp4"}, ValueError, "output_type: expected one of 'np', 'pt', 'pil', got 'mp4'"),
    (PROMPT, {"latents": torch.zeros(1, 3, 2, 2, 2)}, ValueError, "latents: expected shape (B, C, T, H, W) = (1, 3, "),
    (PROMPT, {"latents": [0.0]}, TypeError, "latents: expected a floating-point tensor, got list"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "options", "error", "message"), REFUSED, ids=[m[:45] for *_, m in REFUSED])
def test_refuses(
    pipeline: TextToVideoPipeline, prompt: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(f"TextToVideoPipeline: {message}")):
        pipeline(prompt, progress=False, **options)


def test_parts_must_fit(pipeline: TextToVideoPipeline) -> None:
    sizes: dict[str, Any] = {"num_frames": 4, "height": 8, "width": 8, "fps": 8}
    other = type(pipeline.text_encoder)()
    with pytest.raises(
        ValueError, match=r"text_encoder: expected width 16 \(the unet's cross_attention_dim\), got 128"
    ):
        TextToVideoPipeline(pipeline.unet, other, DDIMScheduler(), **sizes)
    with pytest.raises(ValueError, match="fps: expected at least"):
        TextToVideoPipeline(pipeline.unet, pipeline.text_encoder, DDIMScheduler(), **{**sizes, "fps": 0})


class TestFolder:
    def test_round_trip(self, pipeline: TextToVideoPipeline, saved: Path) -> None:
        loaded = TextToVideoPipeline.from_pretrained(saved, device="cpu")
        assert torch.equal(sample(loaded), sample(pipeline))
        assert (loaded.num_frames, loaded.height, loaded.width, loaded.fps) == (FRAMES, SIZE, SIZE, 8.0)
        assert dict(loaded.scheduler.config) == dict(pipeline.scheduler.config)

    def test_half_precision_on_the_disk(self, pipeline: TextToVideoPipeline, saved: Path, tmp_path: Path) -> None:
        pipeline.save_pretrained(tmp_path / "half", dtype=torch.float16)
        size = (tmp_path / "half" / "unet" / "model.safetensors").stat().st_size
        assert size < 0.6 * (saved / "unet" / "model.safetensors").stat().st_size
        loaded = TextToVideoPipeline.from_pretrained(tmp_path / "half", device="cpu")
        assert loaded.dtype == pipeline.dtype == torch.float32
        assert (sample(loaded) - sample(pipeline)).abs().max() < 0.05

    @pytest.mark.parametrize("file", ["unet/model.safetensors", "text_encoder/config.json", "fastvdiff.json"])
    @pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
    def test_damage_is_named(self, saved: Path, tmp_path: Path, file: str, damage: str) -> None:
        broken = shutil.copytree(saved, tmp_path / "broken")
        data = bytearray((broken / file).read_bytes())
        data[len(data) // 2] ^= 1
        (broken / file).unlink()
        if damage != "remove":
            (broken / file).write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
        with pytest.raises(ValueError, match=re.escape(file)) as error:
            TextToVideoPipeline.from_pretrained(broken)
        assert isinstance(error.value, DamagedError) or (file, damage) == ("fastvdiff.json", "remove")

    def test_other_folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"holds no fastvdiff\.json: not a fastvdiff pipeline"):
            TextToVideoPipeline.from_pretrained(tmp_path)
        with pytest.raises(FileNotFoundError, match="nothing: no such checkpoint folder; in the package: "):
            TextToVideoPipeline.from_pretrained("nothing")

    def test_packaged_names(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(folder, "ASSETS", saved.parent)
        assert folder.packaged() == ["small"]
        assert TextToVideoPipeline.from_pretrained("small", device="cpu").num_frames == FRAMES

    def test_a_later_format_is_refused(self, pipeline: TextToVideoPipeline, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
        monkeypatch.setattr(folder, "FORMAT", 2)
        pipeline.save_pretrained(tmp_path / "later")
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"fastvdiff\.json: format 2, this fastvdiff .* reads 1"):
            TextToVideoPipeline.from_pretrained(tmp_path / "later")
