"""What every text encoder is to the rest of the package."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class TextEncoder(Protocol):
    """Turns prompts into the sequence that a model's cross-attention reads.

    ```python
    hidden, mask = encoder(["a red circle moving right", ""])
    model(x, t, hidden, encoder_attention_mask=mask)
    ```

    `dim` is the width D of `hidden`, `max_length` the most positions L it ever has. The empty prompt gives the
    unconditional embedding, the one classifier-free guidance starts from.
    """

    dim: int
    max_length: int

    def __call__(self, prompts: list[str], drop: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode B prompts.

        Args:
            prompts: B strings.
            drop: (B,) bool; True replaces that prompt by the unconditional embedding. None drops nothing.

        Returns:
            hidden (B, L, D) in the encoder's dtype, and mask (B, L) bool, True where there is something to attend to.
            L varies from call to call.
        """
        ...
