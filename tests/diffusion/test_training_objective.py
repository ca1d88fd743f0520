"""Schedules, conversions between predictions, guidance, targets and loss weights."""

from __future__ import annotations

import math

import pytest
import torch

from fastvdiff.diffusion import (
    add_noise,
    classifier_free_guidance,
    convert,
    diffusion_loss,
    frame_scales,
    make_betas,
    min_snr_weight,
    rescale_zero_terminal_snr,
    signal_to_noise,
    to_original_and_epsilon,
    training_target,
    velocity,
)

TYPES = ("epsilon", "sample", "v_prediction")
SHAPE = (3, 2, 4, 5, 6)


def clean_and_noise() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(SHAPE).double(), torch.randn(SHAPE).double(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


def test_zero_terminal_snr_keeps_the_start_and_ends_at_zero() -> None:
    betas = make_betas("scaled_linear", 1000, 0.00085, 0.012)
    alphas, rescaled = (torch.cumprod(1 - b, 0) for b in (betas, rescale_zero_terminal_snr(betas)))
    assert rescaled[-1] == 0
    assert signal_to_noise(rescaled)[-1] == 0
    torch.testing.assert_close(rescaled[0], alphas[0])
    assert (rescaled[1:] < rescaled[:-1]).all()
    assert torch.equal(
        make_betas("scaled_linear", 1000, 0.00085, 0.012, zero_terminal_snr=True), rescale_zero_terminal_snr(betas)
    )


def test_cosine_schedule_follows_its_formula() -> None:
    alphas = torch.cumprod(1 - make_betas("squaredcos_cap_v2", 1000).double(), 0)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    expected = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(alphas[:990], expected[:990], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "alpha", [0.3, torch.tensor(0.3), torch.tensor([0.1, 0.5, 0.9])], ids=["float", "0-dim", "batch"]
)
@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("target", TYPES)
def test_conversions_invert_the_forward_process(source: str, target: str, alpha: float | torch.Tensor) -> None:
    clean, noise, _ = clean_and_noise()
    x = add_noise(clean, noise, alpha)
    said = training_target(source, clean, noise, alpha)
    original, epsilon = to_original_and_epsilon(source, x, said, alpha)
    torch.testing.assert_close(original, clean)
    torch.testing.assert_close(epsilon, noise)
    torch.testing.assert_close(convert(said, x, alpha, source, target), training_target(target, clean, noise, alpha))


def test_guidance_per_frame_and_rescale() -> None:
    output, uncond = torch.randn(SHAPE), torch.randn(SHAPE)
    scales = frame_scales(1.0, 3.0, SHAPE[2])
    guided = classifier_free_guidance(output, uncond, scales)
    torch.testing.assert_close(guided[:, :, 0], output[:, :, 0])
    torch.testing.assert_close(guided[:, :, -1], uncond[:, :, -1] + 3 * (output - uncond)[:, :, -1])
    rescaled = classifier_free_guidance(output, uncond, 9.0, rescale=1.0)
    torch.testing.assert_close(rescaled.flatten(1).std(1), output.flatten(1).std(1))


@pytest.mark.parametrize("kind", TYPES)
def test_min_snr_weights_make_the_objectives_one(kind: str) -> None:
    """With the weight, every prediction type's loss is min(SNR, gamma) times the error of x0."""
    clean, noise, alpha = clean_and_noise()
    x = add_noise(clean, noise, alpha)
    said = training_target(kind, clean, noise, alpha) + 0.1 * torch.randn(SHAPE).double()
    original, _ = to_original_and_epsilon(kind, x, said, alpha)
    expected = signal_to_noise(alpha).clamp(max=5) * (original - clean).square().flatten(1).mean(1)
    loss = diffusion_loss(said, clean, noise, alpha, kind, snr_gamma=5.0)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", TYPES)
def test_min_snr_weight_is_finite_at_both_ends(kind: str) -> None:
    weight = min_snr_weight(kind, torch.tensor([0.0, 0.5, 1.0]))
    assert weight.isfinite().all()
    assert (weight >= 0).all()
    if kind == "epsilon":
        assert weight.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_a_floor_keeps_a_weight_near_pure_noise(kind: str) -> None:
    """The error of x0 counts clamp(SNR, floor, gamma) times, from both targets."""
    alpha = torch.tensor([0.0, 0.1, 0.75, 0.99], dtype=torch.float64)
    weight = min_snr_weight(kind, alpha, 5.0, 1.0)
    expected = torch.tensor([1.0, 1.0, 3.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(weight, expected if kind == "sample" else expected * (1 - alpha))
    ones = torch.ones(4, 2, dtype=torch.float64)
    loss = diffusion_loss(ones, 0 * ones, 0 * ones, alpha, kind, snr_gamma=5.0, snr_floor=1.0)
    torch.testing.assert_close(loss, weight)


def test_loss_is_per_sample_in_float32_and_masks() -> None:
    clean, noise = torch.randn(SHAPE).bfloat16(), torch.randn(SHAPE).bfloat16()
    said = torch.randn(SHAPE).bfloat16().requires_grad_()
    alpha = torch.tensor([0.1, 0.5, 0.9])
    loss = diffusion_loss(said, clean, noise, alpha)
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (said.float() - noise.float()).square().flatten(1).mean(1))
    loss.mean().backward()
    assert said.grad.dtype == torch.bfloat16
    assert said.grad.isfinite().all()
    mask = torch.ones(3, 1, SHAPE[2], 1, 1)
    mask[1, :, 2:], mask[2] = 0, 0
    masked = diffusion_loss(said, clean, noise, alpha, mask=mask)
    torch.testing.assert_close(masked[0], loss[0])
    torch.testing.assert_close(masked[1], (said[1, :, :2].float() - noise[1, :, :2].float()).square().mean())
    assert masked[2] == 0  # nothing counts: no loss, no NaN


def test_velocity_is_the_derivative_along_the_arc() -> None:
    """x = cos(phi) x0 + sin(phi) eps has dx / dphi = v."""
    clean, noise, _ = clean_and_noise()
    phi, step = 0.7, 1e-6
    x = [math.cos(p) * clean + math.sin(p) * noise for p in (phi - step, phi + step)]
    torch.testing.assert_close(
        velocity(clean, noise, math.cos(phi) ** 2), (x[1] - x[0]) / (2 * step), rtol=1e-6, atol=1e-6
    )


def test_errors() -> None:
    x = torch.randn(SHAPE)
    for call in (
        lambda: training_target("eps", x, x, 0.5),
        lambda: convert(x, x, 0.5, "epsilon", "eps"),
        lambda: to_original_and_epsilon("eps", x, x, 0.5),
        lambda: min_snr_weight("eps", torch.tensor([0.5])),
    ):
        with pytest.raises(
            ValueError, match="prediction_type: expected one of 'epsilon', 'sample', 'v_prediction', got 'eps'"
        ):
            call()
    for kind, floor in (("epsilon", 1.0), ("sample", 6.0), ("v_prediction", -1.0)):
        with pytest.raises(ValueError, match=f"floor: expected 0, or .* up to gamma = 5, got {floor:g} for {kind}"):
            min_snr_weight(kind, torch.tensor([0.5]), 5.0, floor)
    with pytest.raises(ValueError, match="schedule: expected one of"):
        make_betas("cubic", 10)
