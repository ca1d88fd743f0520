"""The order of things in a race, on a device that only notes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.device_race import CLOCK, DeviceRace
from tests.benchmarks.fake_device import FakeDevice


def providers(*names: str) -> dict[str, Callable[[], Any]]:
    return {name: (lambda name=name: name) for name in names}


def test_every_sample_starts_cold_and_stands_between_two_events() -> None:
    calls = providers("eager", "fastvdiff")
    device = FakeDevice()
    race = DeviceRace(device, "fastvdiff", calls)
    race.prepare()
    device.log.clear()
    race.round()
    sample = [("flush", 1), "event", ("replay", calls["eager"], 1), "event"]
    assert device.log[:4] == sample
    assert device.log[-1] == "synchronize"
    assert device.log.count("synchronize") == 1  # the host stays ahead of the device within a round


def test_the_order_turns_around_every_round() -> None:
    calls = providers("a", "b", "c")
    device = FakeDevice()
    race = DeviceRace(device, "b", calls)
    race.prepare()
    device.log.clear()
    race.round()
    race.round()
    order = [entry[1]() for entry in device.log if entry[0] == "replay"]
    assert order == ["a", "b", "c", "c", "b", "a"]


def test_times_are_the_devices_own_and_flushes_are_not_in_them() -> None:
    calls = providers("eager", "fastvdiff")
    device = FakeDevice({calls["eager"]: 4.0, calls["fastvdiff"]: 0.5})
    race = DeviceRace(device, "fastvdiff", calls)
    race.prepare()
    before = CLOCK()
    for _ in range(8):
        race.round()
    spreads = race.spreads()
    assert spreads["eager"].median == pytest.approx(4.0)
    assert spreads["fastvdiff"].median == pytest.approx(0.5)
    assert CLOCK() - before == pytest.approx(8 * 0.5e-3)  # what pytest-benchmark reads: the contender's device time


def test_what_cannot_be_captured_is_launched_behind_enough_work() -> None:
    calls = providers("eager", "fastvdiff")
    device = FakeDevice(uncapturable=(calls["eager"],))
    race = DeviceRace(device, "fastvdiff", calls)
    race.prepare()
    assert race.launched == ["eager"]
    device.log.clear()
    race.round()
    assert device.log[0][1] > 10
    assert ("flush", 1) in device.log


def test_rounds_fit_the_budget_and_its_limits() -> None:
    calls = providers("eager", "fastvdiff")
    for milliseconds, budget, expected in ((5.0, 0.3, 30), (100.0, 0.3, 10), (0.001, 0.3, 100)):
        device = FakeDevice(dict.fromkeys(calls.values(), milliseconds))
        race = DeviceRace(device, "fastvdiff", calls)
        race.prepare()
        assert race.rounds(budget) == expected
        assert not race.milliseconds  # the round that was looked at is not kept


def test_warm_samples_are_many_calls_without_a_flush() -> None:
    calls = providers("eager", "fastvdiff")
    device = FakeDevice({calls["eager"]: 0.2, calls["fastvdiff"]: 0.1})
    race = DeviceRace(device, "fastvdiff", calls)
    race.prepare()
    device.log.clear()
    race.warm(rounds=4)
    assert not [entry for entry in device.log if entry[0] == "flush"]
    assert all(entry[2] > 1 for entry in device.log if entry[0] == "replay")
    assert len(race.warm_milliseconds["eager"]) == 4
    assert race.warm_spreads()["fastvdiff"].median == pytest.approx(0.1)
