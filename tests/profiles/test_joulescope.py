"""A driver with the names and the report of pyjoulescope_driver 2.2.12; no instrument was at hand."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest

import edgekit.profiles.joulescope as module
from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles.joulescope import JoulescopeMeter


class Driver:
    """As ``pyjoulescope_driver.Driver``; reports once from a thread when it is subscribed to."""

    open_drivers = 0

    def __init__(self, devices=("u/js220/002557",), reports: bool = True) -> None:
        self.devices, self.reports = list(devices), reports
        self.published: dict[str, object] = {}
        self.callback = None
        self.topic = ""
        Driver.open_drivers += 1

    def finalize(self, timeout=None) -> None:
        Driver.open_drivers -= 1

    def device_paths(self, timeout=None):
        return self.devices

    def open(self, device_prefix, mode=None, timeout=None) -> None:
        if device_prefix not in self.devices:
            raise TimeoutError(f"jsdrv_open timed out | {device_prefix}")

    def publish(self, topic, value, timeout=None) -> None:
        self.published[topic] = value

    def subscribe(self, topic, flags, fn, timeout=None) -> None:
        assert flags == "pub"
        self.topic, self.callback = topic, fn
        if self.reports:
            threading.Thread(target=self.report, args=(100.0,)).start()

    def report(self, energy_j: float) -> None:
        assert self.callback is not None
        accumulators = {"charge": {"value": 0.0, "units": "C"}, "energy": {"value": energy_j, "units": "J"}}
        self.callback(self.topic, {"accumulators": accumulators})


@pytest.fixture
def made(monkeypatch):
    """Drivers that were made; ``made.devices`` and ``made.reports`` say what they find."""
    drivers = SimpleNamespace(devices=["u/js220/002557"], reports=True, all=[])

    def make():
        drivers.all.append(Driver(drivers.devices, drivers.reports))
        return drivers.all[-1]

    Driver.open_drivers = 0
    monkeypatch.setitem(sys.modules, "pyjoulescope_driver", SimpleNamespace(Driver=make))
    monkeypatch.setattr(module, "FIRST_S", 0.2)
    yield drivers
    assert Driver.open_drivers == 0


def test_joules_since_it_was_opened(made, clock):
    meter = JoulescopeMeter(clock=clock)
    assert isinstance(meter, Meter)
    assert meter.unavailable() is None
    facts = meter.facts()
    assert (facts.quantity, facts.scope, facts.parts) == ("energy", "device", ("u/js220/002557",))
    assert facts.update_interval_s == 0.02
    meter.open()
    assert meter.read().value == 0
    driver = made.all[-1]
    assert driver.topic == "u/js220/002557/s/stats/value"
    assert driver.published == {
        "u/js220/002557/s/i/range/mode": "auto",
        "u/js220/002557/s/stats/scnt": 20_000,
        "u/js220/002557/s/stats/ctrl": 1,
    }
    clock.pass_s(1.0)
    driver.report(103.5)
    clock.pass_s(0.01)
    reading = meter.read()
    assert reading.value == pytest.approx(3.5)
    assert reading.time_ns == 1_000_000_000, "when the report came"
    assert meter.facts().parts == ("u/js220/002557",)
    meter.close()


def test_a_js110_reports_by_itself(made):
    made.devices = ["u/js110/000099"]
    meter = JoulescopeMeter()
    meter.open()
    assert made.all[-1].topic == "u/js110/000099/s/sstats/value"
    assert meter.facts().update_interval_s == 0.5
    meter.close()


def test_reports_that_stop(made, clock):
    meter = JoulescopeMeter(clock=clock)
    meter.open()
    clock.pass_s(0.3)
    with pytest.raises(MeasurementError, match="u/js220/002557 reports no more"):
        meter.read()
    meter.close()


def test_reports_that_never_come(made):
    made.reports = False
    with pytest.raises(MeasurementError, match="sends no report"):
        JoulescopeMeter().open()


def test_energy_that_flows_backwards(made, clock):
    meter = JoulescopeMeter(clock=clock)
    meter.open()
    made.all[-1].report(99.0)
    with pytest.raises(MeasurementError, match="wired the wrong way round"):
        meter.read()
    meter.close()


def test_which_instrument(made):
    made.devices = ["u/js220/1", "u/js110/2", "u/other/3"]
    reason = JoulescopeMeter().unavailable()
    assert reason == "there are u/js220/1, u/js110/2; choose one: JoulescopeMeter(device='u/js220/1')"
    assert JoulescopeMeter(device="u/js110/2").unavailable() is None
    made.devices = []
    assert "no Joulescope JS110 or JS220 is plugged in" in (JoulescopeMeter().unavailable() or "")


def test_an_instrument_that_does_not_open(made, monkeypatch):
    monkeypatch.setattr(Driver, "open", lambda self, path: (_ for _ in ()).throw(TimeoutError("jsdrv_open timed out")))
    with pytest.raises(MeasurementError, match=r"u/js220/002557 cannot be used \(jsdrv_open timed out\)"):
        JoulescopeMeter().open()


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyjoulescope_driver", None)
    assert "pip install 'edgekit[joulescope]'" in (JoulescopeMeter().unavailable() or "")
    assert "leave root as it is" in (JoulescopeMeter(root=tmp_path).unavailable() or "")
