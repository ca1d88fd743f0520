"""Muon: momentum whose singular values are made equal, so that every direction of a matrix learns at one rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# An orthogonal (m, n) matrix has an RMS of max(m, n)^-1/2; Adam's updates have one of 0.2 to 0.4.
RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Muon over matrices and convolution kernels, these as (out, in * kernel) matrices.

    `torch.optim.Muon` takes matrices alone and iterates in bfloat16, 10 to 30 times as slow as float32 on a CPU without
    bfloat16 arithmetic. Here it is float32 on a CPU, bfloat16 elsewhere.

    Args:
        params: parameters of at least two dimensions, or groups of them.
        lr: on AdamW's scale: an update's RMS is 0.2 of it.
        weight_decay: decoupled, as AdamW's.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024, with the scale of Liu et
    al., arXiv:2502.16982, section 2.2.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update. closure: not supported, as the loss is evaluated by the trainer."""
        if closure is not None:
            raise ValueError("Muon.step: closure: expected None")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _update(self, parameter: torch.Tensor, grad: torch.Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(grad, 1 - MOMENTUM)
        matrix = grad.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
        update = orthogonalized(matrix).to(parameter.dtype).view(parameter.shape)
        parameter.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * RMS * max(matrix.shape) ** 0.5)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T for a matrix U S V^T (m, n): its singular values are moved to between 0.7 and 1.2, zeros stay.

    Five steps of a quintic Newton-Schulz iteration; float32 on a CPU, bfloat16 elsewhere.
    """
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[0] <= x.shape[1] else wide.T
