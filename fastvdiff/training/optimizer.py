"""AdamW over named parameters, its learning rate as a function of the step, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    """torch's fused AdamW over the parameters of named modules, with a state that safetensors can hold.

    parameters: by name; those of the text encoder start with "text_encoder." and get their own share of the rate.
    Matrices and kernels decay; vectors (biases, norms, embeddings of one position) do not. With `config.matrices` the
    network's matrices and kernels take `Muon` instead.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> None:
        self.parameters = dict(parameters)
        groups: dict[str, list[dict[str, Any]]] = {"adamw": [], "muon": []}
        for is_text in (False, True):
            for decayed in (True, False):
                members = [
                    p for name, p in self.parameters.items()
                    if (p.dim() > 1) == decayed and name.startswith(TEXT_PREFIX) == is_text
                ]  # fmt: skip
                if members:
                    groups[config.matrices if decayed and not is_text else "adamw"].append(
                        {
                            "params": members,
                            "weight_decay": config.weight_decay if decayed else 0.0,
                            "lr_share": config.text_lr_share if is_text else 1.0,
                        }
                    )
        self.inner: list[torch.optim.Optimizer] = []
        if groups["adamw"]:
            self.inner.append(
                torch.optim.AdamW(groups["adamw"], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
            )
        if groups["muon"]:
            self.inner.append(Muon(groups["muon"], lr=config.lr))

    def step(self, lr: float, scaler: torch.amp.GradScaler | None = None) -> None:
        """One update at this rate, which `scaler` leaves out where a gradient overflowed; the gradients are dropped."""
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_share"]
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Divide the gradients by the scale of the loss."""
        for optimizer in self.inner:
            scaler.unscale_(optimizer)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The state as `{"<parameter>/<moment>": tensor}`; empty before the first step."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for optimizer in self.inner
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
        for name, state in states.items():
            parameter = self.parameters[name]
            self._optimizer_of(parameter).state[parameter] = state

    def _optimizer_of(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        return next(
            optimizer for optimizer in self.inner
            if any(member is parameter for group in optimizer.param_groups for member in group["params"])
        )  # fmt: skip
