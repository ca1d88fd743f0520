"""Video noise: unit variance, the promised correlation between frames, and reproducible draws."""

from __future__ import annotations

import math

import pytest
import torch

from fastvdiff.diffusion import correlate_frames, draw_noise, video_noise

SHAPE = (2, 4, 6, 64, 64)


def frame_correlations(noise: torch.Tensor) -> torch.Tensor:
    """(T, T) second moments over everything but the frames."""
    rows = noise.double().movedim(2, 0).flatten(1)
    return rows @ rows.T / rows.shape[1]


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("kind", ["iid", "mixed", "progressive"])
def test_moments(kind: str, alpha: float | None) -> None:
    noise = video_noise(SHAPE, kind, alpha, generator=torch.Generator().manual_seed(0))
    assert noise.shape == SHAPE
    a = {"iid": 0.0, "mixed": 1.0, "progressive": 2.0}[kind] if alpha is None else alpha
    lags = (torch.arange(6)[:, None] - torch.arange(6)).abs().double()
    expected = torch.eye(6, dtype=torch.float64)
    if kind == "mixed":
        expected = torch.where(lags == 0, 1.0, a**2 / (1 + a**2))
    elif kind == "progressive":
        expected = (a / math.sqrt(1 + a**2)) ** lags
    n = noise.numel() / 6
    assert (frame_correlations(noise) - expected).abs().max() < 6 / math.sqrt(n)
    assert abs(noise.double().pow(4).mean() - 3) < 0.1  # still normal


def test_one_frame_and_dtype() -> None:
    for kind in ("mixed", "progressive"):
        noise = video_noise((1, 1, 1, 4, 4), kind, dtype=torch.float64)
        assert noise.shape == (1, 1, 1, 4, 4)
        assert noise.dtype == torch.float64


def test_generators() -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(s) for s in seeds]

    pair = draw_noise((2, 3, 4), generators(1, 2))
    assert torch.equal(pair[1:], draw_noise((1, 3, 4), generators(2)))
    assert torch.equal(draw_noise((2, 3), generators(1)), torch.randn(2, 3, generator=generators(1)[0]))
    torch.manual_seed(3)
    drawn = draw_noise((2, 3))
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.randn(2, 3))
    with pytest.raises(ValueError, match="expected 1 or 2 generators, got 3"):
        draw_noise((2, 3), generators(1, 2, 3))
    with pytest.raises(ValueError, match="expected 1 or 2 generators, got 0"):
        draw_noise((2, 3), [])


def test_errors() -> None:
    with pytest.raises(ValueError, match="kind: expected one of 'iid', 'mixed', 'progressive', got 'pink'"):
        video_noise(SHAPE, "pink")
    with pytest.raises(ValueError, match="alpha: expected a number from 0 upward, got -1"):
        video_noise(SHAPE, "mixed", -1)
    with pytest.raises(ValueError, match=r"shape: expected \(B, C, T, H, W\), got \(2, 3\)"):
        video_noise((2, 3))
    with pytest.raises(ValueError, match="kind"):
        correlate_frames(torch.randn(1, 1, 2, 2, 2), "pink")
