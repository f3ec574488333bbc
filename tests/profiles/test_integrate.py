"""Known joules: analytic power on a clock of our own, read in every way that a real sensor is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import MeasurementError
from edgekit.measured import MeterFacts
from edgekit.profiles.integrate import Series, joules, power_of

WINDOW_S = 10.0


def facts(quantity="power", **changes) -> MeterFacts:
    return MeterFacts(**{"name": "m", "quantity": quantity, "scope": "board", "covers": "all", **changes})


def truth(power, start_s, stop_s):
    """A Riemann sum, fine enough."""
    times = np.linspace(start_s, stop_s, 2_000_001)
    middles = (times[1:] + times[:-1]) / 2
    return float(power(middles).sum() * (times[1] - times[0]))


def square(period_s, share=0.5, low=2.0, high=10.0):
    return lambda t: np.where(np.mod(t, period_s) < share * period_s, high, low)


SIGNALS = {
    "constant": lambda t: 5.0 + 0 * t,
    "ramp": lambda t: 1.0 + t,
    "square, slow": square(2.0),
}
BURSTS = square(0.02, share=0.2, high=20.0)
"""As often as the sensor is read."""


def at_random(rng, mean_s=0.02, start_s=-1.0, count=700):
    return start_s + np.cumsum(mean_s * rng.uniform(0.5, 1.5, count))


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("update_s", [None, 0.02])
def test_power_within_one_percent_and_within_its_bound(signal, update_s):
    """Read at random moments; or every few milliseconds a sensor that has something new every 20 ms, and tells that."""
    power, rng = SIGNALS[signal], np.random.default_rng(1)
    expected = truth(power, 0, WINDOW_S)
    for _ in range(50):
        times = at_random(rng, 0.004, count=3500) if update_s else at_random(rng)
        phase = rng.uniform(0, update_s or 1)
        seen = times if update_s is None else np.floor((times - phase) / update_s) * update_s + phase
        found = joules(Series(times, power(seen)), 0, WINDOW_S, facts=facts(update_interval_s=update_s))
        assert found.energy_j == pytest.approx(expected, rel=0.01)
        assert abs(found.energy_j - expected) <= found.bound_j + 1e-9
        # A sensor that does not tell, and says the same for a second, may not have had anything new.
        assert found.updates == pytest.approx(500 if update_s or signal == "ramp" else 10, abs=60)
        assert found.gap_s == 0


@pytest.mark.parametrize("update_s", [0.3, 1.0])
@pytest.mark.parametrize("quantity", ["power", "energy"])
def test_a_value_of_unknown_age_has_a_bound_that_knows_it(quantity, update_s):
    """As of a battery: power that swings, read 20 times a second, new once a second; held values are no updates."""
    fine, rng = np.linspace(-8, 18, 260_001), np.random.default_rng(5)
    covered = 0
    for _ in range(100):
        power_w = np.repeat(rng.uniform(2, 20, 261), 1000)[: fine.size]  # another every 0.1 s
        total_j = np.concatenate([[0], np.cumsum(power_w[:-1] * np.diff(fine))])
        expected = float(np.interp(WINDOW_S, fine, total_j) - np.interp(0, fine, total_j))
        times = at_random(rng, 0.05, start_s=-5, count=390)
        seen = np.floor((times - rng.uniform(0, update_s)) / update_s) * update_s
        told = np.interp(seen, fine, total_j) if quantity == "energy" else power_w[np.searchsorted(fine, seen)]
        found = joules(Series(times, told), 0, WINDOW_S, facts=facts(quantity))
        covered += abs(found.energy_j - expected) <= found.bound_j
        assert found.updates == pytest.approx(WINDOW_S / update_s, abs=2)
    assert covered >= 93


def test_a_counter_of_unknown_age_that_stays_counts_on():
    """New every second and read 20 times in it: what it holds back at the ends is in the bound."""
    times = np.arange(-3, 13, 0.05)
    found = joules(Series(times, 10 * np.floor(times - 0.99)), 0.5, 9.9, facts=facts("energy"))
    assert abs(found.energy_j - 94) <= found.bound_j
    assert 5 < found.bound_j < 20
    assert found.updates == 9


def test_bursts_at_the_period_of_reading_are_no_trap():
    """At a fixed period they would be all or nothing; at random moments the truth lies within the bound."""
    expected, rng = truth(BURSTS, 0, WINDOW_S), np.random.default_rng(2)
    found = [joules(Series(t, BURSTS(t)), 0, WINDOW_S, facts=facts()) for t in (at_random(rng) for _ in range(200))]
    assert sum(abs(each.energy_j - expected) <= each.bound_j for each in found) >= 180
    assert np.mean([each.energy_j for each in found]) == pytest.approx(expected, rel=0.02)
    assert min(each.bound_j for each in found) > 0.01 * expected  # no claim of one percent
    regular = np.arange(-1, 11, 0.02)
    blind = joules(Series(regular, BURSTS(regular + 0.01)), 0, WINDOW_S, facts=facts())
    assert blind.energy_j < 0.4 * expected


def test_jitter_repeats_and_gaps():
    rng, power = np.random.default_rng(3), SIGNALS["square, slow"]
    times = np.sort(np.concatenate([at_random(rng), at_random(rng)]))
    times = times[(times < 4.0) | (times > 4.8)]
    found = joules(Series(times, power(times)), 0, WINDOW_S, facts=facts())
    assert abs(found.energy_j - truth(power, 0, WINDOW_S)) <= found.bound_j
    assert found.gap_s == pytest.approx(0.8, abs=0.1)
    without = joules(Series(at_random(rng), power(at_random(rng))), 0, WINDOW_S, facts=facts())
    assert found.bound_j > without.bound_j + 2.0  # half the swing of 8 W for the hole


def test_the_edges_are_interpolated_by_hand():
    series = Series(np.array([0.0, 2.0, 4.0]), np.array([0.0, 4.0, 4.0]))
    assert joules(series, 1.0, 3.0, facts=facts()).energy_j == pytest.approx(3.0 + 4.0)
    # Beyond the readings power is as the nearest one.
    assert joules(series, 3.0, 6.0, facts=facts()).energy_j == pytest.approx(12.0)


@settings(max_examples=50)
@given(st.floats(0.1, 50), st.integers(0, 2**32 - 1), st.sampled_from([None, 0.01, 0.1]))
def test_constant_power_is_exact_however_it_is_read(power_w, seed, update_s):
    times = at_random(np.random.default_rng(seed), count=900)
    found = joules(Series(times, np.full(900, power_w)), 0, WINDOW_S, facts=facts(update_interval_s=update_s))
    assert found.energy_j == pytest.approx(power_w * WINDOW_S, rel=1e-9)
    assert found.bound_j == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("signal", [*SIGNALS, "bursts"])
@pytest.mark.parametrize("update_s", [0.001, 0.1])
def test_a_counter_within_one_percent_or_its_bound(signal, update_s):
    """It counts everything, and tells it every millisecond, as RAPL does, or every 100, as NVML does."""
    power, rng = SIGNALS.get(signal, BURSTS), np.random.default_rng(4)
    fine = np.linspace(-2, 12, 1_400_001)
    total = np.concatenate([[0], np.cumsum(power((fine[1:] + fine[:-1]) / 2) * np.diff(fine))])
    expected = truth(power, 0, WINDOW_S)
    for _ in range(50):
        times = np.sort(np.concatenate([at_random(rng, 0.05, count=230), [0.0, WINDOW_S]]))
        told = np.floor(times / update_s) * update_s
        series = Series(times, np.interp(told, fine, total))
        found = joules(series, 0, WINDOW_S, facts=facts("energy", update_interval_s=update_s))
        assert abs(found.energy_j - expected) <= found.bound_j + 1e-3 * expected
        assert found.energy_j == pytest.approx(expected, rel=0.01 if update_s < 0.01 else 0.03)
        assert found.updates == int(WINDOW_S / update_s)


def test_resolution_is_part_of_the_bound():
    times = np.arange(0.0, 11.0)
    counter = facts("energy", resolution=0.5, update_interval_s=0.1)
    assert joules(Series(times, times), 0, 10, facts=counter).bound_j == pytest.approx(0.5 + 0.1)
    steady = Series(times, np.full(11, 2.0))
    assert joules(steady, 0, 10, facts=facts(resolution=0.04)).bound_j == pytest.approx(0.04 / 2 * 10)


@pytest.mark.parametrize(("series", "start", "message"), [
    (Series(np.array([0.0, 1.0]), np.array([0.0, 1.0])), 2.0, "no time passed"),
    (Series(np.array([0.0]), np.array([0.0])), 0.0, "fewer than two readings"),
    (Series(np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.0])), 0.0, "the energy counter went back"),
])  # fmt: skip
def test_what_gives_no_energy(series, start, message):
    with pytest.raises(MeasurementError, match=message):
        joules(series, start, 2.0, facts=facts("energy"))


def test_power_of_a_counter_is_its_slope():
    series = Series(np.array([0.0, 1.0, 3.0]), np.array([0.0, 5.0, 7.0]))
    found = power_of(series, facts("energy"))
    assert found.times_s.tolist() == [1.0, 3.0]
    assert found.values.tolist() == [5.0, 1.0]
    assert power_of(series, facts()) is series
    nothing = Series(np.zeros(0), np.zeros(0))
    assert power_of(nothing, facts("energy")).times_s.size == 0
