"""AdamW over named parameters, its learning rate as a function of the step, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from .config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step `step` of `steps`: lr (n + 1) / warmup at first, then lr or half a cosine down to its floor."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


class NamedAdamW:
    """torch's fused AdamW over the parameters of named modules, with a state that safetensors can hold.

    parameters: by name. Matrices and kernels decay; vectors (biases, norms, embeddings of one position) do not.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> None:
        self.parameters = dict(parameters)
        decayed = [p for p in self.parameters.values() if p.dim() > 1]
        plain = [p for p in self.parameters.values() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.inner = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )

    def step(self, lr: float) -> None:
        """One update at this rate; the gradients are dropped afterwards."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The state as `{"<parameter>/<moment>": tensor}`; empty before the first step."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.inner.state.get(parameter, {}).items()
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
            self.inner.state[self.parameters[name]] = state
