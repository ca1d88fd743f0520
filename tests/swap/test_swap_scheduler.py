"""diffusers' DDIM scheduler with the fused step."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import fastvdiff
from fastvdiff import dispatch

CASES = {
    "epsilon": {},
    "v": {"prediction_type": "v_prediction", "clip_sample": False, "timestep_spacing": "trailing"},
    "sample": {"prediction_type": "sample", "set_alpha_to_one": False, "steps_offset": 1},
    "threshold": {"thresholding": True, "sample_max_value": 2.0},
}


def path(scheduler: Any, eta: float, **options: Any) -> torch.Tensor:
    scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 8, 8, generator=generator)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x, eta=eta, generator=generator, **options).prev_sample
    return x


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_the_same_samples_and_random_numbers(config: dict[str, Any], eta: float) -> None:
    scheduler = diffusers.DDIMScheduler(**config)
    before = path(scheduler, eta)
    pipe = SimpleNamespace(scheduler=scheduler)
    report = fastvdiff.swap_scheduler(pipe)
    assert [e.what for e in report.replaced] == ["DDIMScheduler"]
    assert pipe.scheduler is scheduler
    assert isinstance(scheduler, diffusers.DDIMScheduler)
    walks = dispatch.trace(path, scheduler, eta)
    assert [w.op for w in walks] == ["ddim_step"] * 7
    torch.testing.assert_close(path(scheduler, eta), before, rtol=1e-5, atol=1e-5)
    assert type(copy.deepcopy(scheduler).step(before, 1, before)).__name__ == "DDIMSchedulerOutput"
    assert len(scheduler.step(before, 1, before, return_dict=False)) == 2
    report.undo()
    assert torch.equal(path(scheduler, eta), before)


def test_clipped_model_output_and_another_config() -> None:
    scheduler = diffusers.DDIMScheduler()
    before = path(scheduler, 0.0, use_clipped_model_output=True)
    fastvdiff.swap_scheduler(scheduler)
    torch.testing.assert_close(path(scheduler, 0.0, use_clipped_model_output=True), before, rtol=1e-5, atol=1e-5)
    other = diffusers.DDIMScheduler.from_config(scheduler.config, prediction_type="sample")
    assert type(other) is diffusers.DDIMScheduler


def test_other_schedulers_are_left_alone_with_a_reason() -> None:
    report = fastvdiff.swap_scheduler(diffusers.DDPMScheduler())
    assert not report.replaced
    assert "not a DDIMScheduler" in report.refused[0].why
    with pytest.raises(TypeError, match="swap_scheduler: pipe: expected a diffusers pipeline or scheduler"):
        fastvdiff.swap_scheduler(3)


def test_a_scheduler_has_no_network_to_verify() -> None:
    report = fastvdiff.swap_scheduler(diffusers.DDIMScheduler())
    with pytest.raises(TypeError, match=r"verify: expected the report of a network.* this one is of DDIMScheduler"):
        report.verify()
