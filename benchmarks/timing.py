"""Providers of one case timed in turn, so that a machine whose speed drifts treats them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Spread:
    """Quartiles of a provider's times, in milliseconds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        """Quartiles of measured seconds."""
        low, median, high = (1e3 * q for q in statistics.quantiles(seconds, n=4, method="inclusive"))
        return cls(low, median, high)


def timed(run: Callable[..., Any], inputs: Sequence[torch.Tensor], training: bool) -> Callable[[], Any]:
    """What is timed: the forward without gradient, or forward and backward to the inputs that ask for a gradient."""
    if not training:

        def forward() -> Any:
            with torch.no_grad():
                return run(*inputs)

        return forward

    leaves = [t for t in inputs if t.requires_grad]
    grad = torch.randn_like(first(run(*inputs)))
    return lambda: torch.autograd.grad(first(run(*inputs)), leaves, grad)


def first(result: Any) -> torch.Tensor:
    """The main output of a call."""
    return result[0] if isinstance(result, tuple) else result


@dataclass
class Race:
    """The providers of a case. One of them is timed by pytest-benchmark; `others` runs between its rounds."""

    contender: str
    providers: dict[str, Callable[[], Any]]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    _turn: int = 0

    def warm_up(self) -> None:
        """One call each: compilation, caches, first allocations."""
        for call in self.providers.values():
            call()

    def rounds(self, budget: float, least: int = 7, most: int = 60) -> int:
        """How many rounds of all providers fit into `budget` seconds."""
        start = time.perf_counter()
        for call in self.providers.values():
            call()
        one = time.perf_counter() - start
        return max(least, min(most, int(budget / one)))

    def others(self) -> None:
        """Time every provider but the contender once, forwards and backwards in turn."""
        names = [name for name in self.providers if name != self.contender]
        self._turn += 1
        for name in names if self._turn % 2 else reversed(names):
            self._time(name)

    def contend(self) -> None:
        """Time the contender once."""
        self._time(self.contender)

    def _time(self, name: str) -> None:
        start = time.perf_counter()
        self.providers[name]()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def spreads(self) -> dict[str, Spread]:
        """Each provider's quartiles."""
        return {name: Spread.of(seconds) for name, seconds in self.seconds.items()}
