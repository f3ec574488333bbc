from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgekit import plugins
from edgekit.errors import MeasurementError, PluginError
from edgekit.profiles import Protocol, Reading, ReplayMeter
from edgekit.profiles.energy import find_meter, measure_energy
from edgekit.progress import silent

SETTINGS = Protocol(energy_window_s=2.0, energy_windows=3, idle_s=5.0)


class ScriptedMeter:
    """Energy as any function of the time since it was opened."""

    name = "scripted"
    quantity = "counter"
    scope = "nothing"

    def __init__(self, energy_j, clock, **details) -> None:
        self.energy_j = energy_j
        self.clock = clock
        self.details = details
        self.is_open = False

    def unavailable(self):
        return None

    def open(self):
        self.is_open = True

    def read(self):
        assert self.is_open
        return Reading(time_ns=self.clock(), energy_j=self.energy_j(self.clock() * 1e-9))

    def close(self):
        self.is_open = False

    def describe(self):
        return {"name": self.name, **self.details}


def measure(meter, workloads, clock, protocol=SETTINGS):
    return measure_energy(
        meter, workloads, protocol=protocol, rng=np.random.default_rng(0), clock=clock, sleep=clock.pass_s,
        progress=silent,
    )  # fmt: skip


def takes(clock, seconds):
    return lambda: clock.pass_s(seconds)


def test_gross_and_net_by_hand(clock):
    """2 W idle; working, 6 W: the work adds its own 4 W while it lasts."""
    spent = [0.0]

    def work():
        clock.pass_s(0.01)
        spent[0] += 0.01 * 4

    meter = ScriptedMeter(lambda time_s: 2 * time_s + spent[0], clock)
    measured = measure(meter, [work], clock)
    (energy,) = measured.energies
    assert measured.idle_w == pytest.approx((2, 2))
    assert energy.gross_j == pytest.approx(0.06)
    assert energy.net_j == pytest.approx(0.04)
    assert (energy.meter, energy.quantity, energy.scope) == ("scripted", "counter", "nothing")
    assert energy.inferences == 200
    assert energy.window_s == pytest.approx(2.0)
    assert not meter.is_open


def test_a_ramp_within_one_percent(clock, tmp_path):
    """Power that grows 10 % over the run; windows in random order and their median take most of it away."""
    path = tmp_path / "ramp.csv"
    path.write_text("time_s,power_w\n0,10\n100,11\n")
    protocol = replace(SETTINGS, energy_windows=15, energy_window_s=1.0, idle_s=1.0)
    workloads = [takes(clock, 0.001), takes(clock, 0.002), takes(clock, 0.004)]
    measured = measure(ReplayMeter(path, clock=clock), workloads, clock, protocol)
    power_w = 10 + 0.01 * (1 + 15 * 3 / 2)  # in the middle of the windows
    for energy, seconds in zip(measured.energies, (0.001, 0.002, 0.004), strict=True):
        assert energy.gross_j == pytest.approx(power_w * seconds, rel=0.01)


def test_without_a_baseline_there_is_no_net_energy(clock):
    meter = ScriptedMeter(lambda time_s: time_s, clock)
    measured = measure(meter, [takes(clock, 0.1)], clock, replace(SETTINGS, idle_s=0.0))
    assert measured.idle_w == ()
    assert measured.energies[0].net_j is None
    assert measured.energies[0].gross_j == pytest.approx(0.1)


def test_the_median_window_is_reported(clock):
    """The middle one of three windows costs ten times as much; it is kept out, not averaged in."""
    calls, spent = [0], [0.0]

    def work():
        clock.pass_s(1.0)
        calls[0] += 1
        spent[0] += 10.0 if calls[0] in (3, 4) else 1.0

    meter = ScriptedMeter(lambda time_s: spent[0], clock)
    assert measure(meter, [work], clock).energies[0].gross_j == pytest.approx(1.0)


def test_a_window_below_the_resolution_gives_a_reason_and_no_figure(clock):
    meter = ScriptedMeter(lambda time_s: time_s, clock, resolution_j=0.03)
    energy = measure(meter, [takes(clock, 0.1)], clock).energies[0]
    assert energy.gross_j is None
    assert "less than 100 steps of 0.03 J; give a longer energy_window_s" in (energy.reason or "")
    longer = replace(SETTINGS, energy_window_s=4.0)
    assert measure(meter, [takes(clock, 0.1)], clock, longer).energies[0].gross_j == pytest.approx(0.1)


def test_a_slow_sensor_gets_longer_windows(clock):
    meter = ScriptedMeter(lambda time_s: time_s, clock, update_interval_s=0.5)
    assert measure(meter, [takes(clock, 0.1)], clock).energies[0].window_s == pytest.approx(50.0)


def test_a_meter_is_closed_when_it_fails(clock):
    def energy_j(time_s):
        if time_s > 6:
            raise MeasurementError("the sensor went away")
        return time_s

    meter = ScriptedMeter(energy_j, clock)
    with pytest.raises(MeasurementError, match="went away"):
        measure(meter, [takes(clock, 0.1)], clock)
    assert not meter.is_open


def test_a_clock_that_stands_still(clock):
    meter = ScriptedMeter(lambda time_s: time_s, clock)
    with pytest.raises(MeasurementError, match="no time passed between two readings"):
        measure(meter, [lambda: None], clock, replace(SETTINGS, energy_window_s=0.0))


def test_no_meter_gives_every_reason(tmp_path):
    meter, reason = find_meter(root=tmp_path)
    assert meter is None
    assert reason.startswith(f"rapl: {tmp_path}/sys/class/powercap does not exist")
    assert "replay" not in reason


def test_a_meter_that_can_measure_is_found(tmp_path):
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    for name, content in (("name", "package-0"), ("energy_uj", "1"), ("max_energy_range_uj", "262143328850")):
        (zone / name).write_text(content)
    meter, reason = find_meter(root=tmp_path)
    assert meter is not None
    assert meter.name == "rapl"
    assert reason == ""


def test_a_broken_meter_is_a_reason_and_no_crash(monkeypatch, tmp_path, clock):
    def create(kind, name, **options):
        if name == "broken":
            raise PluginError("meter 'broken' cannot be loaded: no such thing")
        return ScriptedMeter(lambda time_s: time_s, clock)

    monkeypatch.setattr(plugins, "names", lambda kind: ("broken",))
    monkeypatch.setattr(plugins, "create", create)
    assert find_meter(root=tmp_path) == (None, "broken: meter 'broken' cannot be loaded: no such thing")
    monkeypatch.setattr(plugins, "names", lambda kind: ("broken", "works"))
    assert isinstance(find_meter(root=tmp_path)[0], ScriptedMeter)
    monkeypatch.setattr(plugins, "names", lambda kind: ())
    assert "no meter is registered" in find_meter(root=tmp_path)[1]
