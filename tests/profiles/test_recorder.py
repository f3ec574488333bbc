from __future__ import annotations

import threading
import time
from contextlib import nullcontext

import numpy as np
import pytest

from edgekit.errors import MeasurementError
from edgekit.profiles.recorder import Recorder, in_background


def test_readings_come_while_time_passes(clock, scripted_meter):
    meter = scripted_meter(lambda time_s: 3 * time_s, clock)
    with Recorder(meter, zero_ns=0, repeat=clock.repeat) as recorder:
        clock.pass_s(10)
        assert recorder.joules(2.0, 8.0).energy_j == pytest.approx(18.0)
        times = recorder.series().times_s
    assert times.size == pytest.approx(200, abs=20)
    assert np.all(np.diff(times) > 0)
    assert len(set(np.round(np.diff(times), 6))) > 50, "readings at a fixed period would miss what has the same one"
    assert not meter.is_open


@pytest.mark.parametrize(("quantity", "update_s", "every_s"), [
    ("energy", 0.001, 0.05),
    ("power", 0.1, 0.05),
    ("power", 0.001, 0.01),
    ("power", None, 0.05),
])  # fmt: skip
def test_how_often_a_meter_is_read(clock, scripted_meter, quantity, update_s, every_s):
    meter = scripted_meter(lambda time_s: 1.0, clock, quantity=quantity, update_interval_s=update_s)
    assert Recorder(meter, zero_ns=0).every_s == pytest.approx(every_s)


def test_nothing_is_read_while_paused(clock, scripted_meter):
    with Recorder(scripted_meter(lambda time_s: time_s, clock), zero_ns=0, repeat=clock.repeat) as recorder:
        with recorder.paused():
            clock.pass_s(5)
        assert recorder.series().times_s.size == 1
        clock.pass_s(5)
        assert recorder.series().times_s.size > 50


def test_a_sensor_that_vanishes_leaves_what_it_gave(clock, scripted_meter):
    def value(time_s):
        if time_s > 4:
            raise MeasurementError("scripted: the sensor is gone; plug it in")
        return time_s

    meter = scripted_meter(value, clock)
    with Recorder(meter, zero_ns=0, repeat=clock.repeat) as recorder:
        clock.pass_s(10)
        assert recorder.joules(1.0, 3.0).energy_j == pytest.approx(2.0)
        for _ in range(2):
            with pytest.raises(MeasurementError, match="the sensor is gone"):
                recorder.take()
    assert not meter.is_open


def test_a_plugin_that_crashes_is_a_reason(clock, scripted_meter):
    def value(time_s):
        if time_s > 1:
            raise ZeroDivisionError("oops")
        return time_s

    with Recorder(scripted_meter(value, clock), zero_ns=0, repeat=clock.repeat) as recorder:
        clock.pass_s(3)
        with pytest.raises(MeasurementError, match=r"scripted: failed \(ZeroDivisionError: oops\)"):
            recorder.take()


def test_a_plugin_that_crashes_in_whoever_asks_is_a_reason_too(clock, scripted_meter):
    def value(time_s):
        if time_s > 1:
            raise OSError("no such device")
        return time_s

    meter = scripted_meter(value, clock)
    with Recorder(meter, zero_ns=0, repeat=lambda *_: nullcontext()) as recorder:
        clock.pass_s(3)
        for _ in range(2):
            with pytest.raises(MeasurementError, match=r"scripted: failed \(OSError: no such device\)"):
                recorder.take()
    meter.open = lambda: 1 / 0
    with pytest.raises(MeasurementError, match="ZeroDivisionError"), Recorder(meter, zero_ns=0):
        pass
    meter.facts = lambda: 1 / 0
    with pytest.raises(MeasurementError, match="ZeroDivisionError"), Recorder(meter, zero_ns=0):
        pass


@pytest.mark.parametrize("power_w", [float("nan"), -4.0, 4294967.295e3])
def test_power_that_cannot_be(clock, scripted_meter, power_w):
    meter = scripted_meter(lambda time_s: power_w, clock, quantity="power")
    with pytest.raises(MeasurementError, match="which cannot be"), Recorder(meter, zero_ns=0, repeat=clock.repeat):
        pass
    assert not meter.is_open


def test_the_thread_ends_with_the_block():
    seen = []
    with in_background(lambda: seen.append(threading.current_thread().name), 0.002):
        time.sleep(0.2)
    count = len(seen)
    assert count > 10
    assert set(seen) == {"edgekit-meter"}
    time.sleep(0.02)
    assert len(seen) == count
