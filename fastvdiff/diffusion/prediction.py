"""The three things a model may predict, and how one becomes another.

With x = sqrt(a) x0 + sqrt(1 - a) epsilon: "epsilon" is the noise, "sample" is x0, and "v_prediction" is
v = sqrt(a) epsilon - sqrt(1 - a) x0 (Salimans & Ho 2022, arXiv:2202.00512).
"""

from __future__ import annotations

import torch

from fastvdiff.reference.ddim_step import PREDICTION_TYPES, alpha_column, original_and_epsilon


def check_prediction_type(owner: str, prediction_type: str) -> None:
    """Raise ValueError unless `prediction_type` is one of the three; `owner` opens the message."""
    if prediction_type not in PREDICTION_TYPES:
        known = ", ".join(repr(name) for name in PREDICTION_TYPES)
        raise ValueError(f"{owner}: prediction_type: expected one of {known}, got {prediction_type!r}")


def coefficients(alpha: float | torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(a) and sqrt(1 - a), shaped and typed to multiply `like`; alpha a float, 0-dim or (B,)."""
    column = alpha_column(alpha, like.dim())
    if column.dim():  # a number alone multiplies a tensor of any device: moving it would wait for the device
        column = column.to(like.device)
    return column.sqrt().to(like.dtype), (1 - column).sqrt().to(like.dtype)


def add_noise(original: torch.Tensor, noise: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """sqrt(a) x0 + sqrt(1 - a) noise: the forward process, straight to the step whose cumulative product is `alpha`.

    original, noise (B, ...); alpha a float, 0-dim or (B,). Returns a tensor like `original`.
    """
    signal, spread = coefficients(alpha, original)
    return signal * original + spread * noise


def velocity(original: torch.Tensor, noise: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """v = sqrt(a) noise - sqrt(1 - a) x0; shapes as in `add_noise`."""
    signal, spread = coefficients(alpha, original)
    return signal * noise - spread * original


def to_original_and_epsilon(
    prediction_type: str, sample: torch.Tensor, model_output: torch.Tensor, alpha: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x0, epsilon) that a prediction implies.

    sample (the noisy x) and model_output (B, ...); alpha a float, 0-dim or (B,). Where the division is by 0 (epsilon
    at a = 0, sample at a = 1) the result is infinite or NaN.
    """
    check_prediction_type("to_original_and_epsilon", prediction_type)
    return original_and_epsilon(prediction_type, sample, model_output, *coefficients(alpha, sample))


def convert(
    model_output: torch.Tensor, sample: torch.Tensor, alpha: float | torch.Tensor, source: str, target: str
) -> torch.Tensor:
    """The prediction of type `target` that says the same as `model_output`, of type `source`; shapes as above."""
    check_prediction_type("convert", target)
    if source == target:
        return model_output
    original, epsilon = to_original_and_epsilon(source, sample, model_output, alpha)
    if target == "v_prediction":
        return velocity(original, epsilon, alpha)
    return epsilon if target == "epsilon" else original
