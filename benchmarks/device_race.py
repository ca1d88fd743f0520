"""Providers of one case timed on a device: cold and warm L2, in turn, forwards and then backwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.timing import Spread

SMALL = 50_000_000  # bytes: below this a case's tensors may stay in the L2 between calls
_REPLAYED = 20  # calls of a warm sample, in one graph
_LEAD = 20  # flushes ahead of calls that could not be captured: the host launches them meanwhile


class Mark(Protocol):
    """A moment on the device's time line."""

    def record(self) -> None:
        """Set it here."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from here to `end`."""


class Device(Protocol):
    """What a race needs of a device; benchmarks/cuda.py is the real one."""

    def flush(self, times: int = 1) -> None:
        """Leave nothing of what ran before in the L2."""

    def event(self) -> Mark:
        """A moment not set yet."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """The most memory that a call holds above what there was before."""

    def graph(self, call: Callable[[], Any], times: int = 1) -> Callable[[], None]:
        """`times` calls that one replay runs; RuntimeError where they cannot be captured."""


class DeviceClock:
    """A clock for pytest-benchmark that stands still except for the device time of contenders."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """Device seconds of all contenders so far."""
        return self.seconds


CLOCK = DeviceClock()


@dataclass
class DeviceRace:
    """The providers of a case on a device.

    Each cold sample is a flush of the L2 and then one call between two events; the call is replayed from a graph, so
    that no launch of the host's stands in it, unless it cannot be captured (`launched` names those: enough flushes run
    ahead that their launches are queued in time). With `captured=False` none is: a call
    takes what the host takes to launch it, if that is longer.
    """

    device: Device
    contender: str
    providers: dict[str, Callable[[], Any]]
    captured: bool = True
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    warm_milliseconds: dict[str, list[float]] = field(default_factory=dict)
    launched: list[str] = field(default_factory=list)
    _calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    _turn: int = 0

    def prepare(self) -> None:
        """Capture every provider, and run each once."""
        for name, call in self.providers.items():
            self._calls[name] = self._graph(name, call) if self.captured else call
            self._calls[name]()
        self.device.synchronize()

    def _graph(self, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        try:
            return self.device.graph(call)
        except RuntimeError:  # synchronises, or copies from pageable memory
            self.launched.append(name)
            return call

    def rounds(self, budget: float, least: int = 10, most: int = 100) -> int:
        """How many rounds of all providers fit into `budget` seconds of device time, from one that is not kept."""
        self.round()
        one = sum(sample[0] for sample in self.milliseconds.values()) / 1e3
        self.milliseconds.clear()
        return max(least, min(most, int(budget / max(one, 1e-6))))

    def round(self) -> None:
        """One cold sample of each provider, in an order that turns around every round."""
        self._turn += 1
        names = list(self.providers) if self._turn % 2 else list(reversed(self.providers))
        marks = {}
        for name in names:
            start, end = self.device.event(), self.device.event()
            self.device.flush(_LEAD if name in self.launched else 1)
            start.record()
            self._calls[name]()
            end.record()
            marks[name] = (start, end)
        self.device.synchronize()
        for name, (start, end) in marks.items():
            self.milliseconds.setdefault(name, []).append(start.elapsed_time(end))
        CLOCK.seconds += self.milliseconds[self.contender][-1] / 1e3

    def warm(self, rounds: int = 10) -> None:
        """Samples of calls that follow each other in one graph: what the L2 keeps, it keeps."""
        graphs = {
            name: self.device.graph(call, _REPLAYED)
            for name, call in self.providers.items()
            if name not in self.launched
        }
        for turn in range(rounds + 1):
            for name in list(graphs) if turn % 2 else list(reversed(graphs)):
                start, end = self.device.event(), self.device.event()
                start.record()
                graphs[name]()
                end.record()
                self.device.synchronize()
                if turn:  # the first is not kept
                    self.warm_milliseconds.setdefault(name, []).append(start.elapsed_time(end) / _REPLAYED)

    def spreads(self) -> dict[str, Spread]:
        """Each provider's quartiles, cold."""
        return {name: Spread.of([t / 1e3 for t in times]) for name, times in self.milliseconds.items()}

    def warm_spreads(self) -> dict[str, Spread]:
        """Each provider's quartiles, warm."""
        return {name: Spread.of([t / 1e3 for t in times]) for name, times in self.warm_milliseconds.items()}
