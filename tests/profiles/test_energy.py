from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from edgekit.errors import MeasurementError
from edgekit.measured import MeterFacts, Window
from edgekit.profiles import Protocol, Reading, ReplayMeter
from edgekit.profiles.checks import energy_checks
from edgekit.profiles.energy import EnergyWindows, difference, energy_of, idle_w, intercept_slope
from edgekit.profiles.recorder import Recorder
from edgekit.profiles.workloads import Workload
from edgekit.progress import silent

SETTINGS = Protocol(energy_window_s=2.0, energy_windows=3, idle_s=5.0)
FACTS = MeterFacts(name="m", quantity="energy", scope="board", covers="all")


def work(number: int) -> Workload:
    return Workload(name=f"exit{number}", kind="exit", exit=number)


def measure(meter, runs, clock, protocol=SETTINGS, **options):
    works = {work(number): run for number, run in enumerate(runs)}
    with Recorder(meter, zero_ns=0, repeat=clock.repeat) as recorder:
        taken = EnergyWindows(
            recorder=recorder, works=works, protocol=protocol, rng=np.random.default_rng(0), clock=clock,
            sleep=clock.pass_s, temperature=lambda: None, progress=silent, **options,
        )  # fmt: skip
        taken.run()
    return taken, [energy_of(each.name, taken.windows, recorder.facts) for each in works]


def takes(clock, seconds):
    def run():
        clock.pass_s(seconds)
        return 0

    return run


def test_gross_and_net_by_hand(clock, scripted_meter):
    """2 W idle; working, 6 W: the work adds its own 4 W while it lasts."""
    spent = [0.0]

    def run():
        clock.pass_s(0.01)
        spent[0] += 0.01 * 4
        return 0

    meter = scripted_meter(lambda time_s: 2 * time_s + spent[0], clock)
    taken, (energy,) = measure(meter, [run], clock)
    assert idle_w(taken.windows) == pytest.approx((2, 2))
    assert energy.gross_j == pytest.approx(0.06)
    assert energy.net_j == pytest.approx(0.04)
    assert (energy.meter, energy.method, energy.scope) == ("scripted", "counter", "board: everything")
    assert (energy.inferences, energy.windows) == (200, 3)
    assert energy.window_s == pytest.approx(2.0)
    # Nobody tells how often it is new; it is read every 0.05 s, which is worth 0.3 J of 12.
    assert energy.low_j == pytest.approx(0.06 - 0.0015, rel=0.01)
    assert energy.high_j == pytest.approx(0.06 + 0.0015, rel=0.01)
    assert not meter.is_open


def test_samples_of_power_give_the_same(clock, scripted_meter):
    working = [False]

    def run():
        working[0] = True
        clock.pass_s(0.01)
        working[0] = False
        return 0

    meter = scripted_meter(lambda time_s: 6.0 if working[0] else 2.0, clock, quantity="power")
    _, (energy,) = measure(meter, [run], clock)
    assert energy.method == "integrated"
    assert energy.gross_j == pytest.approx(0.06, rel=0.01)
    assert energy.net_j == pytest.approx(0.04, rel=0.015)
    assert energy.low_j < 0.06 < energy.high_j


def test_a_ramp_within_one_percent(clock, tmp_path):
    """Power that grows 10 % over the run; windows in random order and their median take most of it away."""
    path = tmp_path / "ramp.csv"
    path.write_text("time_s,power_w\n0,10\n100,11\n")
    protocol = replace(SETTINGS, energy_windows=15, energy_window_s=1.0, idle_s=1.0)
    seconds = (0.001, 0.002, 0.004)
    _, energies = measure(ReplayMeter(path, clock=clock), [takes(clock, each) for each in seconds], clock, protocol)
    power_w = 10 + 0.01 * (1 + 1.1 * 15 * 3 / 2)  # in the middle of the windows
    for energy, each_s in zip(energies, seconds, strict=True):
        assert energy.gross_j == pytest.approx(power_w * each_s, rel=0.01)
        assert energy.low_j < power_w * each_s < energy.high_j
        assert energy.method == "replay"


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Five windows that scatter by 3 %: the mean interval of a median of five is wide, and covers."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(500):
        each_j = rng.normal(1.0, 0.03, 5)
        energy = energy_of("a", [window("a", joules=j) for j in each_j], FACTS)
        covered += energy.low_j <= 1.0 <= energy.high_j
    assert 465 <= covered <= 492


def window(name, *, joules, kind="exit", count=1, bound=0.0, seconds=10.0) -> Window:
    return Window(
        name=name, kind=kind, start_s=0, stop_s=seconds, inferences=count, energy_j=joules, bound_j=bound, updates=200
    )  # fmt: skip


def test_what_the_sensor_leaves_open_is_in_the_interval():
    energy = energy_of("a", [window("a", joules=2.0, count=2, bound=0.5)] * 3, FACTS)
    assert (energy.low_j, energy.gross_j, energy.high_j) == pytest.approx((0.75, 1.0, 1.25))


def test_idle_power_lies_between_its_baselines():
    windows = [window("a", joules=50.0, count=10)] * 3
    windows += [window("idle", kind="idle", joules=j) for j in (10.0, 20.0)]
    energy = energy_of("a", windows, FACTS)
    assert energy.net_j == pytest.approx(5 - 1.5)
    assert (energy.net_low_j, energy.net_high_j) == pytest.approx((5 - 2.0, 5 - 1.0))


def test_what_the_sensor_leaves_open_while_idle_is_in_the_interval_of_net_energy():
    windows = [window("a", joules=50.0, count=10)] * 3
    windows += [window("idle", kind="idle", joules=j, bound=3.0) for j in (10.0, 20.0)]
    energy = energy_of("a", windows, FACTS)
    assert energy.net_j == pytest.approx(5 - 1.5)
    assert (energy.net_low_j, energy.net_high_j) == pytest.approx((5 - 2.3, 5 - 0.7))


def test_the_median_window_is_reported():
    energy = energy_of("a", [window("a", joules=j) for j in (1.0, 10.0, 1.1)], FACTS)
    assert energy.gross_j == 1.1
    assert energy_of("b", [window("a", joules=1.0)], FACTS).reason == (
        "m: no window of 'b' was finished; resume the measurement"
    )
    assert energy_of("a", [window("a", joules=1.0)] * 2, FACTS).low_j is None
    assert energy_of("a", [window("a", joules=j) for j in (1.0, 1.2, 1.4, 9.0)], FACTS).gross_j == pytest.approx(1.3)


def test_the_slope_knows_no_edges():
    """Every window holds 3 J that are not of the inferences: its figure is too high, its slope is right."""
    counts = ((100, "exit"), (101, "exit"), (99, "exit"), (200, "slope"), (300, "slope"))
    windows = [window("a", joules=3 + 0.1 * count, count=count, kind=kind) for count, kind in counts]
    assert intercept_slope("a", windows) == pytest.approx((3, 0.1))
    assert energy_of("a", windows, FACTS).gross_j == pytest.approx(0.13)
    assert energy_of("a", windows, FACTS).slope_j == pytest.approx(0.1)
    assert intercept_slope("a", windows[:3]) == (None, None)


def test_windows_of_twice_and_three_times_as_many(clock, scripted_meter):
    meter = scripted_meter(lambda time_s: 5 * time_s, clock)
    taken, (energy,) = measure(meter, [takes(clock, 0.01)], clock, replace(SETTINGS, slope=True))
    assert [each.inferences for each in taken.windows if each.kind == "slope"] == [400, 600]
    assert energy.slope_j == pytest.approx(0.05)


def test_stage_energy_by_difference():
    near = [window("a", joules=j) for j in (1.0, 1.1, 0.9, 1.05, 0.95)]
    far = [window("b", joules=j) for j in (1.1, 1.2, 0.8, 1.15, 0.85)]
    assert difference("b", "a", near + far).spans_zero
    much = [window("b", joules=j + 2, bound=0.01) for j in (1.0, 1.1, 0.9, 1.05, 0.95)]
    found = difference("b", "a", near + much)
    assert found.value == pytest.approx(2.0)
    # Welch by hand: standard error sqrt(2 * 0.00625 / 5) = 0.05, 8 degrees of freedom, t = 2.306, and the bound.
    assert (found.low, found.high) == pytest.approx((2 - 0.1253, 2 + 0.1253), abs=1e-4)
    assert difference("a", None, near).value == pytest.approx(1.0)
    assert difference("b", "a", near) is None


def test_a_slow_sensor_gets_longer_windows(clock, scripted_meter):
    """A hundred updates, and two more, since either end may be as old as one; idle windows likewise."""
    meter = scripted_meter(lambda time_s: time_s, clock, update_interval_s=0.5)
    taken, (energy,) = measure(meter, [takes(clock, 0.1)], clock)
    assert energy.window_s == pytest.approx(51.0)
    assert [each.stop_s - each.start_s for each in taken.windows if each.kind == "idle"] == pytest.approx([51.0] * 2)


@pytest.mark.parametrize("update_s", [0.02, 0.5])
def test_a_sensor_that_times_its_own_reports_breaks_no_rule(clock, scripted_meter, update_s):
    """As of a Joulescope: a reading is the last report, so both ends of a window lie before they were asked for."""

    class Streaming(scripted_meter):
        def read(self):
            time_s = math.floor(self.clock() * 1e-9 / update_s) * update_s
            return Reading(time_ns=round(time_s * 1e9), value=6 * time_s)

    meter = Streaming(None, clock, update_interval_s=update_s)
    protocol = replace(SETTINGS, energy_window_s=10.0, idle_s=10.0)
    with Recorder(meter, zero_ns=0, repeat=clock.repeat) as recorder:
        taken, _ = measure(meter, [takes(clock, 0.0137), takes(clock, 0.033)], clock, protocol)
        checks = energy_checks(taken.windows, recorder.facts, recorder.series(), None, (), failure="")
    assert [check.says for check in checks if check.passed is False and check.rule != "sensor-alive"] == []


def test_what_reading_costs_is_seen(clock, scripted_meter):
    """Each reading takes 1 ms from whoever works; the control run before each window has none."""

    def value(time_s):
        clock._now_ns += 1_000_000
        return time_s

    meter = scripted_meter(value, clock, quantity="power", update_interval_s=0.02)
    taken, _ = measure(meter, [takes(clock, 0.02)], clock)
    assert len(taken.costs) == 3
    assert all(1.0 < cost < 1.2 for cost in taken.costs)


def test_it_rests_until_the_device_is_cool(clock, scripted_meter):
    heat = iter([45.0, 43.0, 40.5] * 3)
    protocol = replace(SETTINGS, cooldown_s=60.0, idle_s=0.0)
    works = {work(0): takes(clock, 0.1)}
    with Recorder(scripted_meter(lambda t: t, clock), zero_ns=0, repeat=clock.repeat) as recorder:
        EnergyWindows(
            recorder=recorder, works=works, protocol=protocol, rng=np.random.default_rng(0), clock=clock,
            sleep=clock.pass_s, temperature=lambda: next(heat), start_c=40.0, progress=silent,
        ).run()  # fmt: skip
    assert next(heat, None) is None
    assert clock.now_ns * 1e-9 == pytest.approx(3 * (1.0 + 0.2 + 2.0), abs=0.5)


def test_what_was_measured_before_is_not_measured_again(clock, scripted_meter):
    meter = scripted_meter(lambda time_s: time_s, clock)
    runs = [takes(clock, 0.1), takes(clock, 0.2)]
    before = [window("exit0", joules=1.0)] * 3 + [window("exit1", joules=1.0)]
    taken, _ = measure(meter, runs, clock, windows=list(before))
    new = taken.windows[len(before) :]
    assert sorted(each.name for each in new) == ["exit1", "exit1", "idle", "idle"]


@pytest.mark.parametrize(("there", "missing"), [(0, [400, 600]), (1, [600]), (2, [])])
def test_slope_windows_that_are_missing_are_measured(clock, scripted_meter, there, missing):
    meter = scripted_meter(lambda time_s: 5 * time_s, clock)
    before = [window("exit0", joules=1.0, count=200)] * 3
    before += [window("exit0", kind="slope", joules=1.0, count=count) for count in (400, 600)[:there]]
    taken, _ = measure(meter, [takes(clock, 0.01)], clock, replace(SETTINGS, slope=True), windows=list(before))
    assert [each.inferences for each in taken.windows[len(before) :] if each.kind == "slope"] == missing


def test_inputs_are_renewed_before_every_window(clock, scripted_meter):
    renewed = []
    measure(scripted_meter(lambda t: t, clock), [takes(clock, 0.1)], clock, renewed=lambda: renewed.append(clock()))
    assert len(set(renewed)) == 3


def test_a_meter_that_fails_leaves_its_windows(clock, scripted_meter):
    def value(time_s):
        if time_s > 12:
            raise MeasurementError("the sensor went away")
        return time_s

    meter, kept = scripted_meter(value, clock), []
    with pytest.raises(MeasurementError, match="went away"):
        measure(meter, [takes(clock, 0.1)], clock, windows=kept)
    assert [each.name for each in kept] == ["idle", "exit0", "exit0", "exit0"][: len(kept)]
    assert len(kept) >= 3
    assert not meter.is_open


def test_exits_of_a_window_are_counted(clock, scripted_meter):
    exits = iter([0, 1, 2, 1] * 1000)

    def run():
        clock.pass_s(0.1)
        return next(exits)

    taken, _ = measure(scripted_meter(lambda t: t, clock), [run], clock, replace(SETTINGS, energy_windows=1))
    assert sum(taken.windows[1].exits) == taken.windows[1].inferences == 20
    assert taken.windows[1].exits == (5, 10, 5)
