from __future__ import annotations

import math

import pytest

from edgekit.errors import MeasurementError
from edgekit.interfaces import Reading as Contract
from edgekit.measured import MeterFacts
from edgekit.profiles.reading import PolledMeter, Reading


class Made(PolledMeter):
    """Says what it is told to, and how it was treated."""

    name = "made"
    value = 1.0
    reason: str | None = None

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.calls: list[str] = []

    def unavailable(self):
        return self.reason

    def facts(self):
        return MeterFacts(name=self.name, quantity="power", scope="device", covers="nothing")

    def _value(self):
        return self.value

    def _start(self):
        self.calls.append("start")

    def _stop(self):
        self.calls.append("stop")


def test_a_reading_is_what_the_contract_says(clock):
    meter = Made(clock=clock)
    meter.open()
    clock.pass_s(1)
    reading: Contract = meter.read()
    assert reading == Reading(time_ns=1_000_000_000, value=1.0)


def test_it_is_started_and_stopped_once(clock):
    meter = Made(clock=clock)
    meter.close()
    meter.open()
    meter.open()  # again: from here
    meter.close()
    meter.close()
    assert meter.calls == ["start", "stop", "start", "stop"]


def test_what_cannot_measure_is_not_started():
    meter = Made()
    meter.reason = "no sensor; use another meter"
    with pytest.raises(MeasurementError, match=r"^made: no sensor; use another meter$"):
        meter.open()
    assert meter.calls == []


@pytest.mark.parametrize("value", [-0.2, math.nan, math.inf])
def test_what_cannot_be(value):
    meter = Made()
    meter.open()
    meter.value = value
    with pytest.raises(MeasurementError, match="which cannot be"):
        meter.read()


def test_a_sensor_may_say_a_little_less_than_nothing():
    meter = Made()
    meter.open()
    meter.value = -0.01
    assert meter.read().value == -0.01


def test_a_meter_that_says_nothing_is_a_mistake_of_its_author():
    class Empty(Made):
        _value = PolledMeter._value

    with pytest.raises(TypeError, match="Can't instantiate abstract class Empty"):
        Empty()
