"""The trainer's parts on their own: rates, draws, optimizer state, weights, log, interruption."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastvdiff.training import CheckpointError, random_states
from fastvdiff.training.claim import claimed
from fastvdiff.training.config import DiffusionConfig, OptimizerConfig
from fastvdiff.training.interruption import Interruption
from fastvdiff.training.log import Meter, MetricsLog
from fastvdiff.training.muon import orthogonalized
from fastvdiff.training.objective import Objective, stream_seed
from fastvdiff.training.optimizer import NamedOptimizer, learning_rate
from fastvdiff.training.weights import load_weights, weights_of

CPU = torch.device("cpu")
SHAPE = (8, 3, 2, 4, 4)


def test_learning_rate() -> None:
    cosine = OptimizerConfig(lr=1.0, warmup_steps=10, final_lr=0.1)
    assert [learning_rate(cosine, step, 110) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert learning_rate(cosine, 10, 110) == 1.0
    assert learning_rate(cosine, 60, 110) == pytest.approx(0.55)
    assert learning_rate(cosine, 110, 110) == pytest.approx(0.1)
    constant = OptimizerConfig(lr=1.0, warmup_steps=0, schedule="constant")
    assert {learning_rate(constant, step, 110) for step in (0, 50, 109)} == {1.0}


def test_draws_are_a_function_of_seed_and_step() -> None:
    first = Objective(DiffusionConfig(), 1, CPU).draw(7, SHAPE)
    torch.manual_seed(5)
    for again, same in ((Objective(DiffusionConfig(), 1, CPU).draw(7, SHAPE), True),
                        (Objective(DiffusionConfig(), 1, CPU).draw(8, SHAPE), False),
                        (Objective(DiffusionConfig(), 2, CPU).draw(7, SHAPE), False)):  # fmt: skip
        assert torch.equal(first.noise, again.noise) is same
        assert torch.equal(first.timesteps, again.timesteps) is same
    seeds = {stream_seed(seed, purpose, step) for seed in range(9) for purpose in ("a", "b") for step in range(99)}
    assert len(seeds) == 9 * 2 * 99


def test_draws_cover_every_noise_level_and_drop_captions() -> None:
    config = DiffusionConfig(num_train_timesteps=40, unconditional=0.25)
    objective = Objective(config, 0, CPU)
    draws = [objective.draw(step, SHAPE) for step in range(200)]
    for each in draws:
        assert (each.timesteps // 5).tolist() == list(range(8))
    assert torch.cat([each.timesteps for each in draws]).unique().numel() == 40
    assert torch.cat([each.drop for each in draws]).float().mean() == pytest.approx(0.25, abs=0.03)
    shifted = Objective(DiffusionConfig(timestep_shift=3.0), 0, CPU)
    levels = torch.cat([shifted.draw(step, SHAPE).timesteps for step in range(100)]).double()
    assert levels.median() == pytest.approx(750, abs=30)
    assert levels.max() == 999
    assert not Objective(DiffusionConfig(unconditional=0.0), 0, CPU).draw(0, SHAPE).drop.any()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_network_has_no_loss(prediction_type: str) -> None:
    """What the network should say, worked out here from the noisy clip and the clean one, costs nothing."""
    objective = Objective(DiffusionConfig(prediction_type=prediction_type, snr_gamma=5.0), 0, CPU)
    video = torch.rand(SHAPE) * 2 - 1
    draws = objective.draw(0, SHAPE)
    signal_part, noise_part = (
        x.sqrt().reshape(-1, 1, 1, 1, 1)
        for x in (objective.alphas[draws.timesteps], 1 - objective.alphas[draws.timesteps])
    )

    def unet(noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, **_: object) -> torch.Tensor:
        noise = (noisy - signal_part * video) / noise_part
        answers = {"epsilon": noise, "sample": video, "v_prediction": signal_part * noise - noise_part * video}
        return answers[prediction_type]

    loss = objective.loss(unet, lambda captions, drop: (torch.zeros(8, 1, 1), None), video, ["x"] * 8, draws)
    assert loss.shape == (8,)
    assert loss.max() < 1e-4


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_only_matrices_decay() -> None:
    layer = linear()
    config = OptimizerConfig(lr=0.1, weight_decay=0.5)
    optimizer = NamedOptimizer(dict(layer.named_parameters()), config)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    assert torch.equal(layer.bias, before["bias"])
    torch.testing.assert_close(layer.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert layer.weight.grad is None


def test_the_text_encoder_has_its_own_share_of_the_rate() -> None:
    layers = {"unet": linear(), "text_encoder": linear()}
    named = {f"{name}.{key}": p for name, layer in layers.items() for key, p in layer.named_parameters()}
    optimizer = NamedOptimizer(named, OptimizerConfig(weight_decay=0.0, text_lr_share=0.25))
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.1)  # Adam's first step is the rate itself
    for name, parameter in named.items():
        expected = before[name] - (0.025 if name.startswith("text_encoder.") else 0.1)
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (16, 16)])
def test_muon_makes_the_singular_values_alike(shape: tuple[int, int]) -> None:
    rows, columns = (torch.linalg.qr(torch.randn(size, min(shape)))[0] for size in shape)
    values = torch.linalg.svdvals(orthogonalized(rows * torch.logspace(-1.5, 0, min(shape)) @ columns.T))
    assert 0.5 < values.min() < values.max() < 1.3
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


def test_muon_takes_the_matrices_of_the_network_alone() -> None:
    layers = {"unet": nn.Conv2d(3, 4, 3), "text_encoder": linear()}
    named = {f"{name}.{key}": p for name, layer in layers.items() for key, p in layer.named_parameters()}
    optimizer = NamedOptimizer(named, OptimizerConfig(matrices="muon", weight_decay=0.0))
    before = named["unet.weight"].detach().clone()
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(0.1)
    keys = {tuple(entry.rsplit("/", 1)) for entry in optimizer.state_tensors()}
    assert {name for name, key in keys if key == "momentum"} == {"unet.weight"}
    assert {name for name, key in keys if key == "exp_avg"} == set(named) - {"unet.weight"}
    rms = (named["unet.weight"].detach() - before).square().mean().sqrt()
    assert 0.1 * 0.2 * 0.7 < rms < 0.1 * 0.2 * 1.2


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_optimizer_state_round_trips(matrices: str) -> None:
    def steps(layer: nn.Linear, optimizer: NamedOptimizer, count: int) -> None:
        for step in range(count):
            layer(torch.full((1, 3), 1.0 + step)).square().sum().backward()
            optimizer.step(0.01)

    layer, other = linear(), linear()
    config = OptimizerConfig(matrices=matrices)
    first = NamedOptimizer({f"unet.{key}": p for key, p in layer.named_parameters()}, config)
    assert first.state_tensors() == {}
    steps(layer, first, 3)
    other.load_state_dict(layer.state_dict())
    second = NamedOptimizer({f"unet.{key}": p for key, p in other.named_parameters()}, config)
    second.load_state_tensors({name: tensor.clone() for name, tensor in first.state_tensors().items()})
    steps(layer, first, 2)
    steps(other, second, 2)
    assert torch.equal(layer.weight, other.weight)
    with pytest.raises(ValueError, match="optimizer state: 'nobody' is not a parameter of this model"):
        second.load_state_tensors({"nobody/exp_avg": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weight/momentum: expected shape \(2, 3\), got \(4,\)"):
        second.load_state_tensors({"unet.weight/momentum": torch.zeros(4)})


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()
        self.b.weight = self.a.weight
        self.register_buffer("count", torch.zeros(1))


def test_shared_weights_are_stored_once() -> None:
    source, target = Shared(), Shared()
    with torch.no_grad():
        source.a.weight.fill_(3.0)
    assert set(weights_of(source)) == {"a.weight", "a.bias", "b.bias", "count"}
    load_weights(target, weights_of(source), "file")
    assert target.b.weight is target.a.weight
    assert torch.equal(target.b.weight, source.b.weight)


def test_weights_that_do_not_fit_are_named() -> None:
    weights = {"weight": torch.zeros(3, 2), "extra": torch.zeros(1)}
    message = r"file: bias: missing; extra: not a weight of this model; weight: expected shape \(2, 3\), got \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        load_weights(linear(), weights, "file")


def test_log_agrees_with_the_step_resumed_from(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    path.write_text(path.read_text() + '{"step": 4, "lo')
    MetricsLog(path, 2).write(3, {"loss": 9.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 9.0},
    ]  # fmt: skip


def test_meter_means_and_pauses() -> None:
    meter = Meter(CPU)
    assert meter.peek() == {"loss": None, "grad_norm": None}
    for value in (1.0, 3.0):
        meter.add(torch.tensor(value), torch.tensor(10 * value))
    with meter.paused():
        pass
    values = meter.read(0.5)
    assert (values["loss"], values["grad_norm"], values["lr"]) == (2.0, 20.0, 0.5)
    assert values["steps_per_s"] > 0
    assert values["peak_memory_mib"] > 10
    assert meter.peek()["loss"] is None
    meter.add(torch.tensor(math.nan), torch.tensor(1.0))
    assert math.isnan(meter.peek()["loss"])


def test_meter_leaves_out_what_the_scaler_skipped() -> None:
    meter = Meter(CPU, clips_per_step=8, skips=True)
    for norm in (1.0, math.inf, 3.0, math.nan):
        meter.add(torch.tensor(norm), torch.tensor(norm))
    values = meter.read(0.5)
    assert (values["loss"], values["grad_norm"], values["skipped_steps"]) == (2.0, 2.0, 2)
    assert values["clips_per_s"] == pytest.approx(8 * values["steps_per_s"])
    meter.add(torch.tensor(math.inf), torch.tensor(math.inf))
    assert meter.peek() == {"loss": None, "grad_norm": None, "skipped_steps": 1}


def test_random_states_round_trip() -> None:
    def draws() -> tuple[float, ...]:
        return (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item())

    draws()  # an odd number of normal draws: the other half of a pair is part of the state
    tensors, values = random_states.capture()
    before = draws()
    assert draws() != before
    random_states.restore({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(values)))
    assert draws() == before
    with pytest.raises(KeyError):
        random_states.restore({}, values)


def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with claimed(tmp_path / "run"):
        pass
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.read(1) == b"1"
    with (
        pytest.raises(CheckpointError, match="run: another process is training in this folder"),
        claimed(tmp_path / "run"),
    ):
        pass
    other.kill()
    other.communicate()
    with claimed(tmp_path / "run"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: cannot be written: "), claimed(tmp_path / "file"):
        pass


def test_the_second_ctrl_c_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
