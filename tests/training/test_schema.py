"""Configuration files: what is read, and how everything else is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastvdiff.training import ConfigError, TrainConfig
from fastvdiff.training.schema import dump_toml, from_table, read_toml

ASSETS = Path(__file__).resolve().parents[2] / "fastvdiff" / "assets"
MINIMAL = '[run]\nsteps = 1000\n[data]\nfolder = "clips"\n'


def load(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return TrainConfig.load(path, overrides)


def test_defaults_fill_what_a_file_leaves_out(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert (config.run.steps, config.data.folder) == (1000, "clips")
    assert (config.model.preset, config.optimizer.betas, config.diffusion.snr_gamma) == ("tiny", (0.9, 0.99), None)


def test_overrides_win_in_order(tmp_path: Path) -> None:
    config = load(
        tmp_path, MINIMAL, "optimizer.lr=1", "--optimizer.lr=3e-4", "data.folder=a b", "diffusion.snr_gamma=5",
        "diffusion.prediction_type=epsilon", 'output.sample_prompts=["x", "y"]', "model.changes.base_channels=96",
    )  # fmt: skip
    assert config.optimizer.lr == 3e-4
    assert config.data.folder == "a b"
    assert (config.diffusion.snr_gamma, config.diffusion.prediction_type) == (5.0, "epsilon")
    assert config.output.sample_prompts == ("x", "y")
    assert config.model.resolved().base_channels == 96
    assert load(tmp_path, MINIMAL, "diffusion.snr_gamma=5", "diffusion.snr_gamma=none").diffusion.snr_gamma is None


def test_resolved_config_round_trips(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "diffusion.snr_gamma=5", "model.changes.conv=full", 'data.folder=a "b" é\\')
    (tmp_path / "resolved.toml").write_text(dump_toml(config.to_dict()))
    assert TrainConfig.load(tmp_path / "resolved.toml") == config


@pytest.mark.parametrize("name", ["tiny", "shapes"])
def test_packaged_config_is_valid(name: str) -> None:
    config = TrainConfig.load(ASSETS / f"{name}.toml")
    assert config.model.preset == "tiny"
    assert (config.data.num_frames, config.data.height, config.data.width) == (16, 32, 32)


REFUSED = [
    ("[optimizer]\nlrr = 1.0\n", "run.toml: optimizer.lrr: unknown key; did you mean 'optimizer.lr'?"),
    ("[optimiser]\nlr = 1.0\n", "run.toml: optimiser: unknown key; did you mean 'optimizer'?"),
    ('[optimizer]\nlr = "1e-4"\n', "run.toml: optimizer.lr: expected a number above 0, got '1e-4' (string)"),
    ("[optimizer]\nlr = true\n", "run.toml: optimizer.lr: expected a number above 0, got True (boolean)"),
    ("[optimizer]\nlr = nan\n", "run.toml: optimizer.lr: expected a number above 0, got nan (float)"),
    ("[optimizer]\nlr = 0\n", "run.toml: optimizer.lr: expected a number above 0, got 0.0 (float)"),
    ("[optimizer]\nwarmup_steps = 1.5\n", "optimizer.warmup_steps: expected an integer at least 0, got 1.5 (float)"),
    ('[optimizer]\nschedule = "linear"\n', "schedule: expected one of 'constant', 'cosine', got 'linear' (string)"),
    ("[optimizer]\nbetas = [0.9]\n", "run.toml: optimizer: betas: expected two numbers, got 1"),
    (
        "[optimizer]\nbetas = 0.9\n",
        "optimizer.betas: expected an array, each element a number at least 0 and at most 1",
    ),
    ("[output]\nsample_prompts = [1]\n", "output.sample_prompts: expected a string, got 1 (integer)"),
    ("[output]\nkeep = 0\n", "run.toml: output.keep: expected an integer at least 1, got 0 (integer)"),
    ('[model]\npreset = "huge"\n', "run.toml: model: preset: expected one of 'tiny', 'vdm', 'latent', got 'huge'"),
    ("[model.changes]\nbase = 1\n", "run.toml: model: VideoUNetConfig: unknown key 'base'"),
    ("[model.changes]\ncross_attention_dim = 0\n", "cross_attention_dim: expected at least 1, got 0"),
    ('[diffusion]\nprediction_type = "epsilon"\nzero_terminal_snr = true\n', "zero_terminal_snr: at zero signal"),
    (
        "[diffusion]\nsnr_floor = 1.0\n",
        "snr_floor: expected 0, or up to snr_gamma with v_prediction or sample, got 1 with",
    ),
    (
        '[diffusion]\nprediction_type = "epsilon"\nsnr_gamma = 5.0\nsnr_floor = 1.0\n',
        "snr_floor: expected 0, or up to snr_gamma with v_prediction or sample, got 1 with snr_gamma = 5.0 and epsilon",
    ),
    ("[optimizer]\nwarmup_steps = 1000\n", "optimizer.warmup_steps: expected fewer than run.steps = 1000, got 1000"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_wrong_values_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, MINIMAL + text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "optimizer.lr: expected an override of the form --section.key=value"),
        ("optimizer.lrr=1", "--optimizer.lrr=1: optimizer.lrr: unknown key; did you mean 'optimizer.lr'?"),
        ("nothing=1", "--nothing=1: nothing: unknown key; known keys: run, data, seed"),
        ("optimizer=1", "--optimizer=1: optimizer: expected a value, it is a section"),
        ("seed.x=1", "--seed.x=1: seed: expected a section, it is a value"),
        ("optimizer.lr=fast", "--optimizer.lr=fast: optimizer.lr: expected a number above 0, got 'fast'"),
        ("optimizer.lr=-1", "--optimizer.lr=-1: optimizer.lr: expected a number above 0, got -1.0 (float)"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, MINIMAL, override)


def test_required_keys_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: run\.steps: missing; expected an integer at least 1"):
        load(tmp_path, '[data]\nfolder = "clips"\n')
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML"):
        load(tmp_path, "[run\n")
    with pytest.raises(ConfigError, match="no such configuration file"):
        read_toml(tmp_path / "missing.toml")
    (tmp_path / "big.toml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(ConfigError, match="2,097,152 bytes are too many for a configuration file"):
        read_toml(tmp_path / "big.toml")
    with pytest.raises(ConfigError, match="run: expected a table, got 3"):
        from_table(TrainConfig, {"run": 3}, "a file")
