"""AdamW and Muon over named parameters, the learning rate as a function of the step, the state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .config import OptimizerConfig
from .muon import Muon

TEXT_PREFIX = "text_encoder."


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step `step` of `steps`: lr (n + 1) / warmup at first, then lr or half a cosine down to its floor."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


class NamedOptimizer:
    """AdamW or Muon over the parameters of named modules, with a state that safetensors can hold.

    parameters: by name; those of the text encoder start with "text_encoder." and get their own share of the rate.
    Matrices and kernels decay; vectors (biases, norms, embeddings of one position) do not. With `config.matrices` the
    network's matrices and kernels take `Muon`, and torch's fused AdamW the rest.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> None:
        self.parameters = dict(parameters)
        members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            members.setdefault((name.startswith(TEXT_PREFIX), parameter.dim() > 1), []).append(parameter)
        groups: dict[str, list[dict[str, Any]]] = {}
        for (is_text, decayed), parameters_alike in members.items():
            groups.setdefault(config.matrices if decayed and not is_text else "adamw", []).append(
                {
                    "params": parameters_alike,
                    "weight_decay": config.weight_decay if decayed else 0.0,
                    "lr_share": config.text_lr_share if is_text else 1.0,
                }
            )
        make: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
            "adamw": lambda of: torch.optim.AdamW(of, lr=config.lr, betas=config.betas, eps=config.eps, fused=True),
            "muon": lambda of: Muon(of, lr=config.lr),
        }
        self.optimizers = [make[kind](of) for kind, of in groups.items()]
        self._stepped = self.optimizers[0] if len(self.optimizers) == 1 else _Together(self.optimizers)

    def step(self, lr: float, scaler: torch.amp.GradScaler | None = None) -> None:
        """One update at this rate, which `scaler` leaves out where a gradient overflowed; the gradients are dropped."""
        for group in self._stepped.param_groups:
            group["lr"] = lr * group["lr_share"]
        if scaler is None:
            self._stepped.step()
        else:
            scaler.step(self._stepped)
            scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Divide the gradients by the scale of the loss."""
        scaler.unscale_(self._stepped)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The state as `{"<parameter>/<moment>": tensor}`; empty before the first step."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for optimizer in self.optimizers
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_tensors` gave. Raises ValueError for a parameter unknown here or of another shape."""
        states: dict[str, dict[str, torch.Tensor]] = {}
        for entry, tensor in tensors.items():
            name, _, key = entry.rpartition("/")
            parameter = self.parameters.get(name)
            if parameter is None:
                raise ValueError(f"optimizer state: {name!r} is not a parameter of this model")
            if tensor.dim() and tensor.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state: {entry}: expected shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}"
                )
            states.setdefault(name, {})[key] = tensor.to(parameter.device)
        optimizer_of = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for name, state in states.items():
            parameter = self.parameters[name]
            optimizer_of[parameter].state[parameter] = state


class _Together:
    """Optimizers that step as one: a scaled loss whose gradient overflowed leaves the step out for all of them."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """A step of each."""
        for optimizer in self.optimizers:
            optimizer.step()
