from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles import ReplayMeter


def recording(path: Path, quantity: str, points) -> Path:
    path.write_text(f"time_s,{quantity}\n" + "".join(f"{time!r},{value!r}\n" for time, value in points))
    return path


def energy_at(path: Path, clock, seconds: float) -> float:
    meter = ReplayMeter(path, clock=clock)
    meter.open()
    clock.pass_s(seconds)
    return meter.read().energy_j


def test_constant_power(tmp_path, clock):
    path = recording(tmp_path / "a.csv", "power_w", [(0.0, 5.0), (100.0, 5.0)])
    assert energy_at(path, clock, 12.5) == pytest.approx(62.5)


def test_a_ramp_is_exact_between_its_lines_too(tmp_path, clock):
    path = recording(tmp_path / "a.csv", "power_w", [(0.0, 0.0), (10.0, 20.0)])
    assert energy_at(path, clock, 5.0) == pytest.approx(2 * 5**2 / 2)


def test_a_sine_sampled_at_10_hz_is_within_one_percent(tmp_path, clock):
    times = np.arange(0, 20.05, 0.1).tolist()
    path = recording(tmp_path / "a.csv", "power_w", [(time, 5 + 3 * np.sin(time).item()) for time in times])
    golden, _ = integrate.quad(lambda time: 5 + 3 * np.sin(time), 0, 13.37)
    assert energy_at(path, clock, 13.37) == pytest.approx(golden, rel=0.01)


def test_energy_is_interpolated_from_its_first_line(tmp_path, clock):
    path = recording(tmp_path / "a.csv", "energy_j", [(50.0, 1000.0), (60.0, 1100.0), (70.0, 1100.0)])
    assert energy_at(path, clock, 4.0) == pytest.approx(40.0)
    assert energy_at(path, clock, 15.0) == pytest.approx(100.0)


@given(
    st.lists(st.floats(0, 100), min_size=2, max_size=20),
    st.lists(st.floats(0.01, 5), min_size=20, max_size=20),
    st.floats(0, 1),
)
def test_energy_to_any_moment_is_the_area_so_far(tmp_path_factory, powers, gaps, fraction):
    now = [0]
    times = np.cumsum([0.0, *gaps[: len(powers) - 1]])
    path = recording(tmp_path_factory.mktemp("replay") / "a.csv", "power_w", zip(times.tolist(), powers, strict=True))
    meter = ReplayMeter(path, clock=lambda: now[0])
    meter.open()
    now[0] = int(fraction * times[-1] * 1e9)
    at_s = now[0] * 1e-9
    cut = np.append(times[times < at_s], at_s)
    pieces = np.interp(cut, times, powers)
    golden = float(np.sum(np.diff(cut) * (pieces[1:] + pieces[:-1]) / 2))
    assert meter.read().energy_j == pytest.approx(golden, rel=1e-6, abs=1e-6)


def test_it_is_a_meter_and_says_that_it_replays(tmp_path):
    meter = ReplayMeter(recording(tmp_path / "a.csv", "power_w", [(0.0, 1.0), (1.0, 1.0)]))
    assert isinstance(meter, Meter)
    assert meter.unavailable() is None
    assert meter.describe()["replay"] is True


def test_without_a_recording(tmp_path):
    meter = ReplayMeter()
    assert "ReplayMeter(" in (meter.unavailable() or "")
    with pytest.raises(MeasurementError, match="was given none"):
        meter.open()


def test_past_the_end_nothing_is_made_up(tmp_path, clock):
    path = recording(tmp_path / "a.csv", "power_w", [(0.0, 1.0), (2.0, 1.0)])
    with pytest.raises(MeasurementError, match=r"a\.csv: the recording ends after 2 s"):
        energy_at(path, clock, 2.1)


def test_read_before_open(tmp_path):
    with pytest.raises(MeasurementError, match="read before open"):
        ReplayMeter(recording(tmp_path / "a.csv", "power_w", [(0.0, 1.0), (1.0, 1.0)])).read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no recording"),
        ("time_s,power_w\n0,1\n", "no recording"),
        ("time,power_w\n0,1\n1,1\n", "no recording"),
        ("time_s,watts\n0,1\n1,1\n", "no recording"),
        ("time_s,power_w\n0,1\n1,high\n", "line 3: not two numbers"),
        ("time_s,power_w\n0,1\n1\n", "line 3: not two numbers"),
        ("time_s,power_w\n0,1\n0,2\n", "line 3: times must increase"),
        ("time_s,power_w\n0,1\n1,nan\n", "line 3: times must increase and values be finite"),
        ("time_s,energy_j\n0,9\n1,1\n", "line 3: energy decreases"),
    ],
)
def test_what_is_no_recording(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(MeasurementError, match=message):
        ReplayMeter(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(MeasurementError, match=r"gone\.csv: the recording cannot be read"):
        ReplayMeter(tmp_path / "gone.csv")
