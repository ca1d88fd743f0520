"""How well a share is known from a few trials."""

from __future__ import annotations

import math


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval that holds the true share with 95 % confidence (Wilson, 1927), as (low, high) in [0, 1].

    successes of trials. z: quantile of the normal distribution, 1.96 for 95 %.
    Raises ValueError unless 0 <= successes <= trials and trials >= 1.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"wilson_interval: expected 0 <= successes <= trials >= 1, got {successes} of {trials}")
    share, square = successes / trials, z * z / trials
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)
