"""Scheduler configurations: read-only, interchangeable with diffusers', whole on disk."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path

import pytest

diffusers = pytest.importorskip("diffusers")

from fastvdiff.diffusion import DDIMScheduler, DDPMScheduler  # noqa: E402


def test_items_are_attributes_and_read_only() -> None:
    config = DDIMScheduler(500, steps_offset=1).config
    assert config.num_train_timesteps == config["num_train_timesteps"] == 500
    assert config.get("steps_offset") == 1
    assert "clip_sample" in config
    assert dict(config)["beta_end"] == 0.02
    for change in (
        lambda: config.update(a=1), lambda: config.__setitem__("a", 1), lambda: setattr(config, "a", 1),
        lambda: config.pop("beta_end"), config.clear,
    ):  # fmt: skip
        with pytest.raises(TypeError, match="read-only"):
            change()
    with pytest.raises(AttributeError, match="has no 'sigma'"):
        _ = config.sigma
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_arguments_and_defaults_are_diffusers(name: str) -> None:
    ours = {"DDIMScheduler": DDIMScheduler, "DDPMScheduler": DDPMScheduler}[name]().config
    theirs = getattr(diffusers, name)().config
    public = {k: v for k, v in theirs.items() if not k.startswith("_")}
    assert {k: v for k, v in ours.items() if not k.startswith("_")} == public


def test_from_ours_theirs_and_a_dict() -> None:
    theirs = diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False)
    from_theirs = DDIMScheduler.from_config(theirs.config, timestep_spacing="trailing")
    assert from_theirs.config.prediction_type == "v_prediction"
    assert from_theirs.config.timestep_spacing == "trailing"
    back = diffusers.DDIMScheduler.from_config(from_theirs.config)
    assert back.config.beta_schedule == "scaled_linear"
    assert back.config.timestep_spacing == "trailing"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what only the other scheduler takes is no surprise
        ddpm = DDPMScheduler.from_config(from_theirs.config)
        assert DDIMScheduler.from_config(DDPMScheduler(variance_type="fixed_large").config)
    assert ddpm.config.beta_schedule == "scaled_linear"
    with pytest.warns(UserWarning, match="ignored skip_prk_steps: not an argument"):
        DDIMScheduler.from_config({"skip_prk_steps": True, "beta_start": 0.001})


def test_save_and_load_in_both_directions(tmp_path: Path) -> None:
    ours = DDIMScheduler(steps_offset=1, clip_sample=False)
    ours.save_pretrained(tmp_path / "scheduler")
    assert [p.name for p in (tmp_path / "scheduler").iterdir()] == ["scheduler_config.json"]
    assert DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler").config == ours.config
    assert diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler").config.steps_offset == 1
    diffusers.DDPMScheduler(variance_type="fixed_large").save_pretrained(tmp_path / "theirs")
    assert DDPMScheduler.from_pretrained(tmp_path / "theirs").config.variance_type == "fixed_large"
    assert DDPMScheduler.from_pretrained(tmp_path / "theirs", clip_sample=False).config.clip_sample is False


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no scheduler_config\.json in"):
        DDIMScheduler.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text('{"beta_start": 0.0')
    with pytest.raises(ValueError, match="is not valid JSON"):
        DDIMScheduler.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="holds a list"):
        DDIMScheduler.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="config: expected a mapping, got str"):
        DDIMScheduler.from_config("ddim")
    with pytest.raises(TypeError, match="unexpected betas"):
        DDIMScheduler.from_config({}, betas=3)
