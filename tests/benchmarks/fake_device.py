"""A device made of words: it notes what a race asks of it, and its clock moves by what it was told each call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device, self.at = device, 0.0

    def record(self) -> None:
        self._device.log.append("event")
        self.at = self._device.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


class FakeDevice:
    """`milliseconds` is what each provider's call takes, by the call itself; `uncapturable` calls have no graph."""

    def __init__(self, milliseconds: dict[Any, float] | None = None, uncapturable: tuple[Any, ...] = ()) -> None:
        self.milliseconds, self.uncapturable = milliseconds or {}, uncapturable
        self.log: list[Any] = []
        self.now = 0.0

    def flush(self, times: int = 1) -> None:
        self.log.append(("flush", times))
        self.now += 0.05 * times

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        call()
        return 1_000_000

    def graph(self, call: Callable[[], Any], times: int = 1) -> Callable[[], None]:
        if call in self.uncapturable:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay() -> None:
            self.log.append(("replay", call, times))
            self.now += times * self.milliseconds.get(call, 1.0)

        return replay
