from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgekit.errors import MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles.replay import ReplayMeter


def recording(path: Path, quantity: str, points) -> Path:
    path.write_text(f"time_s,{quantity}\n" + "".join(f"{time!r},{value!r}\n" for time, value in points))
    return path


def value_at(path: Path, clock, seconds: float) -> float:
    meter = ReplayMeter(path, clock=clock)
    meter.open()
    clock.pass_s(seconds)
    return meter.read().value


def test_power_is_interpolated(tmp_path, clock):
    path = recording(tmp_path / "a.csv", "power_w", [(3.0, 0.0), (13.0, 20.0), (23.0, 20.0)])
    assert value_at(path, clock, 5.0) == pytest.approx(10.0)
    assert value_at(path, clock, 8.0) == pytest.approx(16.0)
    assert value_at(path, clock, 15.0) == pytest.approx(20.0)


def test_energy_is_interpolated_from_its_first_line(tmp_path, clock):
    path = recording(tmp_path / "a.csv", "energy_j", [(50.0, 1000.0), (60.0, 1100.0), (70.0, 1100.0)])
    assert value_at(path, clock, 4.0) == pytest.approx(40.0)
    assert value_at(path, clock, 15.0) == pytest.approx(100.0)


@given(
    st.lists(st.floats(0, 100), min_size=2, max_size=20),
    st.lists(st.floats(0.01, 5), min_size=20, max_size=20),
    st.floats(0, 1),
)
@example([0.0, 0.0], [0.234375] * 20, 1.0)  # whose nanoseconds, times 1e-9, are more
def test_power_lies_on_the_line_between_its_neighbours(tmp_path_factory, powers, gaps, fraction):
    now = [0]
    times = np.cumsum([0.0, *gaps[: len(powers) - 1]])
    path = recording(tmp_path_factory.mktemp("replay") / "a.csv", "power_w", zip(times.tolist(), powers, strict=True))
    meter = ReplayMeter(path, clock=lambda: now[0])
    meter.open()
    now[0] = int(fraction * times[-1] * 1e9)
    at_s = now[0] * 1e-9
    right = min(max(int(np.searchsorted(times, at_s)), 1), len(powers) - 1)
    share = (at_s - times[right - 1]) / (times[right] - times[right - 1])
    golden = powers[right - 1] * (1 - share) + powers[right] * share
    assert meter.read().value == pytest.approx(golden, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("column", "quantity", "unit"), [("power_w", "power", "W"), ("energy_j", "energy", "J")])
def test_it_is_a_meter_and_says_that_it_replays(tmp_path, column, quantity, unit):
    meter = ReplayMeter(recording(tmp_path / "a.csv", column, [(0.0, 1.0), (1.0, 1.0)]))
    assert isinstance(meter, Meter)
    assert meter.unavailable() is None
    facts = meter.facts()
    assert (facts.quantity, facts.unit, facts.replay, facts.method) == (quantity, unit, True, "replay")
    assert facts.scope == "recording"
    assert "a.csv" in facts.covers


def test_without_a_recording(tmp_path):
    meter = ReplayMeter()
    assert "ReplayMeter(" in (meter.unavailable() or "")
    with pytest.raises(MeasurementError, match="was given none"):
        meter.open()


def test_past_the_end_nothing_is_made_up(tmp_path, clock):
    path = recording(tmp_path / "a.csv", "power_w", [(0.0, 1.0), (2.0, 1.0)])
    with pytest.raises(MeasurementError, match=r"a\.csv: the recording ends after 2 s"):
        value_at(path, clock, 2.1)


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
