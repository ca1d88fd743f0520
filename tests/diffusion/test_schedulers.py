"""DDIM and DDPM schedulers against diffusers' own, and what ours add."""

from __future__ import annotations

import copy
import itertools
import sys
from typing import Any
from unittest import mock

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from fastvdiff.diffusion import DDIMScheduler, DDPMScheduler  # noqa: E402
from fastvdiff.diffusion.schedulers.base import spaced_timesteps  # noqa: E402

LIMITS = {
    "clip": {"clip_sample": True, "clip_sample_range": 0.8},
    "free": {"clip_sample": False},
    "threshold": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0},
}
SPACINGS = ("leading", "trailing", "linspace")
SHAPE = (2, 3, 4, 5, 6)


def both(name: str, **config: Any) -> tuple[Any, Any]:
    """Our scheduler and diffusers' of the same configuration, after set_timesteps(7)."""
    ours = {"DDIM": DDIMScheduler, "DDPM": DDPMScheduler}[name](**config)
    theirs = getattr(diffusers, f"{name}Scheduler")(**config)
    ours.set_timesteps(7)
    theirs.set_timesteps(7)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    return ours, theirs


def in_float64(theirs: Any) -> Any:
    """diffusers' scheduler with the same table, computing in float64."""
    wide = copy.deepcopy(theirs)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one"):
        if hasattr(wide, name):
            setattr(wide, name, getattr(wide, name).double())
    return wide


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def their_step(
    scheduler: Any,
    dtype: torch.dtype,
    output: torch.Tensor,
    t: int,
    x: torch.Tensor,
    noise: torch.Tensor,
    **options: Any,
) -> Any:
    """diffusers' step in `dtype`, with `noise` for what it draws."""
    module = sys.modules[type(scheduler).__module__]
    with mock.patch.object(module, "randn_tensor", return_value=noise.to(dtype)):
        return scheduler.step(output.to(dtype), t, x.to(dtype), **options)


def assert_same(got: Any, theirs: Any, *arguments: Any, **options: Any) -> None:
    """`got` is what diffusers' step gives in float64, to 1e-5, and in float32 but for what that loses itself.

    (1 - a_t / a_prev in float32 keeps four digits at the clean end of consecutive timesteps; ours keeps all.)
    """
    narrow = their_step(theirs, torch.float32, *arguments, **options)
    exact = their_step(in_float64(theirs), torch.float64, *arguments, **options)
    for name in ("prev_sample", "pred_original_sample"):
        mine, plain, truth = (getattr(result, name) for result in (got, narrow, exact))
        assert distance(mine, truth) < 1e-5
        assert distance(mine, plain) < 1e-5 + distance(plain, truth)


@pytest.mark.parametrize("zero_snr", [False, True], ids=["snr", "zero-snr"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_is_diffusers(spacing: str, limits: str, prediction: str, zero_snr: bool) -> None:
    for eta, clipped, to_one in itertools.product((0.0, 0.5, 1.0), (False, True), (False, True)):
        ours, theirs = both(
            "DDIM", timestep_spacing=spacing, prediction_type=prediction, rescale_betas_zero_snr=zero_snr,
            set_alpha_to_one=to_one, steps_offset=int(spacing == "leading"), **LIMITS[limits],
        )  # fmt: skip
        for t in ours.timesteps:
            if prediction == "epsilon" and theirs.alphas_cumprod[t] == 0:
                continue  # epsilon says nothing about x0 there: both divide by 0
            x, output, z = (torch.randn(SHAPE) for _ in range(3))
            got = ours.step(output, t, x, eta, clipped, variance_noise=z)
            assert_same(got, theirs, output, int(t), x, z, eta=eta, use_clipped_model_output=clipped)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_is_diffusers(spacing: str, limits: str, prediction: str, variance: str) -> None:
    ours, theirs = both(
        "DDPM", timestep_spacing=spacing, prediction_type=prediction, variance_type=variance,
        steps_offset=int(spacing == "leading"), **LIMITS[limits],
    )  # fmt: skip
    for t in ours.timesteps:
        x, output, z = (torch.randn(SHAPE) for _ in range(3))
        if variance.startswith("learned"):
            output = torch.cat([output, torch.rand(SHAPE)], dim=1)
        got = ours.step(output, t, x, variance_noise=z)
        assert_same(got, theirs, output, int(t), x, z)


@pytest.mark.parametrize("steps", [None, 7, [900, 500, 499, 3, 1, 0]], ids=["before", "7", "given"])
def test_ddpm_draws_as_diffusers_and_takes_given_timesteps(steps: Any) -> None:
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    if steps is not None:
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(timesteps=steps) if isinstance(steps, list) else scheduler.set_timesteps(steps)
    for t in ours.timesteps[[0, 1, -2, -1]].tolist():
        x, output = torch.randn(SHAPE), torch.randn(SHAPE)
        mine, other = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
        got = ours.step(output, t, x, mine)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
        assert_same(got, theirs, output, t, x, noise)
        theirs.step(output, t, x, other)
        assert torch.equal(mine.get_state(), other.get_state())  # nothing is drawn at t = 0


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_whole_run_is_diffusers(name: str, spacing: str) -> None:
    ours, theirs = both(
        name, timestep_spacing=spacing, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )
    ours.set_timesteps(50)
    theirs.set_timesteps(50)
    options = {"eta": 0.5} if name == "DDIM" else {}
    mine = narrow = exact = torch.randn(SHAPE)
    for t in ours.timesteps.tolist():
        noise = torch.randn(SHAPE)
        mine = ours.step(mine.tanh().roll(1, 2), t, mine, variance_noise=noise, **options).prev_sample
        for dtype in (torch.float32, torch.float64):
            x = narrow if dtype == torch.float32 else exact.double()
            scheduler = theirs if dtype == torch.float32 else in_float64(theirs)
            x = their_step(scheduler, dtype, x.tanh().roll(1, 2), t, x, noise, **options).prev_sample
            narrow, exact = (x, exact) if dtype == torch.float32 else (narrow, x)
    assert distance(mine, exact) < 1e-5
    assert distance(mine, narrow) < 1e-5 + distance(narrow, exact)


def test_ddpm_log_of_the_large_variance_is_the_large_variance() -> None:
    x, output, z = (torch.randn(SHAPE) for _ in range(3))
    large, log = (DDPMScheduler(variance_type=v) for v in ("fixed_large", "fixed_large_log"))
    expected = large.step(output, 500, x, variance_noise=z).prev_sample
    torch.testing.assert_close(log.step(output, 500, x, variance_noise=z).prev_sample, expected)


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_forward_process_is_diffusers(name: str) -> None:
    ours, theirs = both(name, beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True)
    x, z, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([3, 999])
    for timesteps in (t, t[:1], t.int()):
        torch.testing.assert_close(ours.add_noise(x, z, timesteps), theirs.add_noise(x, z, timesteps))
        torch.testing.assert_close(ours.get_velocity(x, z, timesteps), theirs.get_velocity(x, z, timesteps))
    assert len(ours) == len(theirs)
    assert ours.order == theirs.order
    assert ours.init_noise_sigma == theirs.init_noise_sigma
    assert ours.scale_model_input(x, 3) is x


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("trained", [1000, 77])
def test_every_number_of_steps_visits_diffusers_timesteps(spacing: str, trained: int) -> None:
    theirs = diffusers.DDIMScheduler(num_train_timesteps=trained, timestep_spacing=spacing)
    for steps in range(1, trained + 1):
        theirs.set_timesteps(steps)
        assert spaced_timesteps(spacing, trained, steps) == theirs.timesteps.tolist()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_schedules_are_diffusers(schedule: str, zero_snr: bool) -> None:
    config = {"beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr, "beta_start": 0.00085, "beta_end": 0.012}
    ours, theirs = both("DDIM", **config)
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=0, atol=0)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=0)


def test_trained_betas() -> None:
    betas = torch.linspace(0.001, 0.1, 20)
    for given in (betas.tolist(), betas.numpy(), betas):
        ours = DDIMScheduler(num_train_timesteps=20, trained_betas=given)
        assert torch.equal(ours.betas, betas)
        assert DDIMScheduler.from_config(ours.config).betas.equal(betas)


# ---- what ours add --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_guidance_inside_the_step(name: str) -> None:
    ours, _theirs = both(name)
    x, output, uncond, z = (torch.randn(SHAPE) for _ in range(4))
    scale = torch.rand(1, SHAPE[2]) * 6
    guided = uncond + scale.view(1, 1, -1, 1, 1) * (output - uncond)
    guided = (
        0.7 * guided * output.std((1, 2, 3, 4), keepdim=True) / guided.std((1, 2, 3, 4), keepdim=True) + 0.3 * guided
    )
    t = int(ours.timesteps[2])
    got = ours.step(
        output, t, x, variance_noise=z, uncond_output=uncond, guidance_scale=scale, guidance_rescale=0.7
    )  # fmt: skip
    expected = ours.step(guided, t, x, variance_noise=z)
    torch.testing.assert_close(got.prev_sample, expected.prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_one_timestep_per_sample(variance: str) -> None:
    """A (B,) timestep is each sample's own step."""
    x, output, z = (torch.randn(SHAPE) for _ in range(3))
    for scheduler, options in ((DDIMScheduler(), {"eta": 0.5}), (DDPMScheduler(variance_type=variance), {})):
        scheduler.set_timesteps(10)
        t = scheduler.timesteps[[2, -1]]
        together = scheduler.step(output, t, x, variance_noise=z, **options).prev_sample
        for b in range(2):
            alone = scheduler.step(output[b : b + 1], t[b], x[b : b + 1], variance_noise=z[b : b + 1], **options)
            torch.testing.assert_close(together[b : b + 1], alone.prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_a_device_timestep_is_never_read(name: str) -> None:
    """On the meta device there is nothing to read: a step that needed the value would raise."""
    scheduler, _ = both(name)
    scheduler.set_timesteps(7, device="meta")
    x, output, z = (torch.empty(SHAPE, device="meta") for _ in range(3))
    options = {"eta": 0.5} if name == "DDIM" else {}
    for t in scheduler.timesteps:
        x = scheduler.step(output, t, x, variance_noise=z, **options).prev_sample
    assert x.shape == SHAPE
    assert scheduler.add_noise(x, z, scheduler.timesteps[:2]).shape == SHAPE


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_no_synchronisation_in_the_loop(name: str) -> None:
    scheduler, _ = both(name)
    scheduler.set_timesteps(7, device="cuda")
    x, output = torch.randn(SHAPE, device="cuda"), torch.randn(SHAPE, device="cuda")
    options = {"eta": 0.5} if name == "DDIM" else {}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(output, t, x, **options).prev_sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


def test_a_generator_per_sample_and_a_seed() -> None:
    scheduler, _ = both("DDIM")
    x, output, t = torch.randn(SHAPE), torch.randn(SHAPE), int(DDIMScheduler().timesteps[500])
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    pair = scheduler.step(output, t, x, eta=1.0, generator=generators).prev_sample
    one = scheduler.step(output[1:], t, x[1:], eta=1.0, generator=torch.Generator().manual_seed(2)).prev_sample
    torch.testing.assert_close(pair[1:], one)
    first, second, other = (
        scheduler.step(output, t, x, eta=1.0, noise_seed=torch.tensor([s])).prev_sample for s in (4, 4, 5)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_return_dict() -> None:
    scheduler, _ = both("DDIM")
    x = torch.randn(SHAPE)
    assert isinstance(scheduler.step(x, 142, x, return_dict=False), tuple)
    prev, original = scheduler.step(x, 142, x)
    assert prev.shape == original.shape == x.shape


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_errors_name_the_argument() -> None:
    x, z, seed = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([1])
    with pytest.raises(
        ValueError, match="prediction_type: expected one of 'epsilon', 'sample', 'v_prediction', got 'v'"
    ):
        DDIMScheduler(prediction_type="v")
    with pytest.raises(ValueError, match=r"schedule: expected one of 'linear'.*got 'cubic'"):
        DDIMScheduler(beta_schedule="cubic")
    with pytest.raises(ValueError, match="timestep_spacing: expected one of 'leading'"):
        DDIMScheduler(timestep_spacing="even")
    with pytest.raises(ValueError, match="variance_type: expected one of 'fixed_small'"):
        DDPMScheduler(variance_type="small")
    with pytest.raises(ValueError, match=r"trained_betas: expected 1000 values"):
        DDIMScheduler(trained_betas=[0.1])
    with pytest.raises(ValueError, match="call set_timesteps"):
        DDIMScheduler().step(x, 1, x)
    with pytest.raises(ValueError, match="num_inference_steps: expected 1 to 1000"):
        DDIMScheduler().set_timesteps(1001)
    with pytest.raises(ValueError, match="leaves room for steps_offset = 1"):
        DDIMScheduler(steps_offset=1).set_timesteps(1000)
    with pytest.raises(ValueError, match="either num_inference_steps or timesteps"):
        DDPMScheduler().set_timesteps()
    with pytest.raises(ValueError, match="timesteps: expected falling integers"):
        DDPMScheduler().set_timesteps(timesteps=[1, 2])
    ddim, _ = both("DDIM")
    ddpm, _ = both("DDPM")
    with pytest.raises(ValueError, match="timestep: expected 0 to 999"):
        ddim.step(x, 1000, x)
    with pytest.raises(ValueError, match=r"timestep: expected one of self\.timesteps, got 3"):
        ddpm.step(x, 3, x)
    for scheduler, options in ((ddim, {"eta": 1.0}), (ddpm, {})):
        with pytest.raises(ValueError, match="expected one of variance_noise, generator and noise_seed"):
            scheduler.step(x, 142, x, variance_noise=z, noise_seed=seed, **options)
    large = DDPMScheduler(variance_type="fixed_large")
    with pytest.raises(ValueError, match="noise_seed: expected variance_type 'fixed_small'"):
        large.step(x, 142, x, noise_seed=seed)
    with pytest.raises(ValueError, match="model_output: expected 6 channels"):
        DDPMScheduler(variance_type="learned").step(x, 142, x)
