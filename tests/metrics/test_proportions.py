"""Wilson's interval against published values and its own definition."""

from __future__ import annotations

import math

import pytest

from fastvdiff.metrics import wilson_interval


def test_known_values() -> None:
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for counts, expected in (
        ((81, 263), (0.2553, 0.3662)),
        ((15, 148), (0.0624, 0.1605)),
        ((0, 20), (0.0, 0.1611)),
        ((1, 29), (0.0061, 0.1718)),
    ):
        assert wilson_interval(*counts) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (7, 16), (58, 64), (64, 64)])
def test_the_ends_are_z_deviations_away(successes: int, trials: int) -> None:
    share = successes / trials
    for end in wilson_interval(successes, trials):
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / trials), abs=1e-9)


def test_impossible_counts_are_refused() -> None:
    for counts in ((0, 0), (-1, 4), (5, 4)):
        with pytest.raises(ValueError, match="expected 0 <= successes <= trials >= 1"):
            wilson_interval(*counts)
