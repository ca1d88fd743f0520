"""Mixed precision: autocast, and for float16 a scaled loss, whose overflowing steps are left out."""

from __future__ import annotations

from typing import Any

import torch

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_SCALE = 1.0  # the scale starts at 2^16 and halves at every overflow: below 1 the loss itself is not finite


class Precision:
    """What "fp32", "bf16" or "fp16" mean on a device. Parameters and the optimizer's state are float32 in all three.

    `scaler` is torch's GradScaler, which for fp32 and bf16 passes everything through.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device, self.dtype = device, DTYPES[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def log_values(self) -> dict[str, float]:
        """The loss scale, where there is one; waits for the device."""
        return {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}

    def collapsed(self) -> bool:
        """Whether overflows have brought the scale so low that no scale can help; waits for the device."""
        return self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE

    def state(self) -> dict[str, Any]:
        """Plain values; empty where the loss is not scaled."""
        return self.scaler.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; a run that changed its precision starts from a fresh scale."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)
