"""Joules of a stretch of time from a meter's readings, and how far off they may be.

Between two readings of power the truth is not known. It is taken to change linearly (trapezoids), which costs nothing
where power changes slowly. What a jump in between may add or hide has the size of the jump times the time between the
readings; over many readings taken at random moments such errors add up like the steps of a random walk, and the bound
is two standard deviations of that walk. Readings must therefore come at random moments (see
:mod:`edgekit.profiles.recorder`): at a fixed period, bursts of the same period would be seen all or never.

A sensor may say the same for a while before it has something new. Where nobody tells how long, it is taken from the
readings: the usual time between two that differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MeasurementError
from edgekit.measured import MeterFacts

__all__ = ["Joules", "Series", "joules", "power_of"]

ROUNDING = 1e-6
"""Of a number of updates."""
GAP = 5.0
"""A hole: this many times the median time between readings."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Readings in order of time.

    Attributes:
        times_s: ``(readings,) float64``, ascending.
        values: ``(readings,) float64``, joules or watts.
    """

    times_s: Floats
    values: Floats


@dataclass(frozen=True)
class Joules:
    """Energy of a stretch of time.

    Attributes:
        energy_j: used in it.
        bound_j: how far off that may be: 95 % of the time no farther.
        updates: of the sensor in it.
        gap_s: longest time without a reading, when that is a hole; else 0.
    """

    energy_j: float
    bound_j: float
    updates: int
    gap_s: float


def joules(series: Series, start_s: float, stop_s: float, *, facts: MeterFacts) -> Joules:
    """Energy between two moments.

    Args:
        series: readings, from before ``start_s`` to after ``stop_s`` as nearly as there are.
        start_s: beginning.
        stop_s: end, after it.
        facts: of the meter: what a reading is, how often it is new, in which steps.

    Raises:
        MeasurementError: fewer than two readings, no time between the moments, or a counter that went back.
    """
    if not stop_s > start_s:
        raise MeasurementError(f"{facts.name}: no time passed between two readings; give longer energy windows")
    if series.times_s.size < 2:
        raise MeasurementError(f"{facts.name}: fewer than two readings; give longer energy windows")
    fresh = _fresh(series, facts)
    update_s = facts.update_interval_s or _seen_interval_s(series)
    energy_j, bound_j = (
        _counted(fresh, start_s, stop_s, name=facts.name, update_s=update_s)
        if facts.quantity == "energy"
        else _integrated(fresh, start_s, stop_s, update_s=update_s)
    )
    inside = fresh.times_s[(fresh.times_s >= start_s) & (fresh.times_s <= stop_s)]
    updates = int(inside.size)
    if facts.quantity == "energy" or not facts.update_interval_s:  # it goes on between readings, or repeats itself
        updates = int((stop_s - start_s) / update_s + ROUNDING)
    resolution_j = (facts.resolution or 0.0) * (1.0 if facts.quantity == "energy" else (stop_s - start_s) / 2)
    waits = np.diff(np.concatenate([[start_s], inside, [stop_s]]))
    longest = float(waits.max())
    usual = float(np.median(np.diff(fresh.times_s)))
    return Joules(energy_j, bound_j + resolution_j, updates, longest if longest > GAP * usual else 0.0)


def power_of(series: Series, facts: MeterFacts) -> Series:
    """Power over time: as it was read, or between two readings of a counter, at the later one."""
    if facts.quantity == "power":
        return series
    fresh = _fresh(series, facts)
    steps_s = np.diff(fresh.times_s)
    return Series(fresh.times_s[1:], np.diff(fresh.values) / np.where(steps_s > 0, steps_s, np.inf))


def _fresh(series: Series, facts: MeterFacts) -> Series:
    """Without repeats: the same value again, before the sensor can have had a new one.

    The first reading of a value is nearest to when it was true. A value that stays for longer is news of its own: power
    that is steady. Where nobody tells the interval, a counter that stays says nothing, and all readings of power count.
    """
    times_s, values = series.times_s, series.values
    if not facts.update_interval_s:
        return _changes(series) if facts.quantity == "energy" else series
    keep, last = [0], 0
    least_s = 0.999 * facts.update_interval_s  # so that rounding does not make a reading in time a repeat
    for index in range(1, times_s.size):
        if values[index] != values[last] or times_s[index] - times_s[last] >= least_s:
            keep.append(index)
            last = index
    return Series(times_s[keep], values[keep])


def _changes(series: Series) -> Series:
    """Readings that differ from the one before, the first included."""
    new = np.diff(series.values, prepend=np.nan) != 0
    return Series(series.times_s[new], series.values[new])


def _seen_interval_s(series: Series) -> float:
    """Usual time between two readings that differ; that of all readings where none does."""
    steps_s = np.diff(_changes(series).times_s)
    return float(np.median(steps_s)) if steps_s.size else float(series.times_s[-1] - series.times_s[0])


def _counted(series: Series, start_s: float, stop_s: float, *, name: str, update_s: float) -> tuple[float, float]:
    """Difference of a counter, and what it may have held back at either end: one update's worth of energy."""
    if np.any(np.diff(series.values) < 0):
        raise MeasurementError(f"{name}: the energy counter went back; measure again")
    at_start, at_stop = np.interp([start_s, stop_s], series.times_s, series.values)
    missing_s = max(0.0, series.times_s[0] - start_s) + max(0.0, stop_s - series.times_s[-1])
    energy_j = float(at_stop - at_start)
    power_w = np.diff(series.values) / np.maximum(np.diff(series.times_s), 1e-9)
    around = (series.times_s[1:] >= start_s) & (series.times_s[:-1] <= stop_s)
    most_w = float(np.quantile(power_w[around], 0.95)) if np.any(around) else 0.0
    return energy_j, most_w * (update_s + missing_s)


def _integrated(series: Series, start_s: float, stop_s: float, *, update_s: float) -> tuple[float, float]:
    """Trapezoids, the edges interpolated; what lies outside the readings is as the nearest one.

    A reading may be as old as the sensor's update, so a window's ends may show what was before them.
    """
    inner = (series.times_s > start_s) & (series.times_s < stop_s)
    edges = np.interp([start_s, stop_s], series.times_s, series.values)
    times_s = np.concatenate([[start_s], series.times_s[inner], [stop_s]])
    power_w = np.concatenate([edges[:1], series.values[inner], edges[1:]])
    steps_s, jumps_w = np.diff(times_s), np.diff(power_w)
    energy_j = float(np.sum(steps_s * (power_w[1:] + power_w[:-1]) / 2))
    # Independent readings of variance v differ by sqrt(2 v), and each stands for a step, or an update if longer.
    walk_j = 2 * float(np.sqrt(np.sum((np.maximum(steps_s, update_s) * jumps_w) ** 2) / 2))
    usual_s = float(np.median(np.diff(series.times_s)))
    holes_s = float(steps_s[steps_s > GAP * usual_s].sum())
    swing_w = float(series.values.max() - series.values.min())
    return energy_j, walk_j + (holes_s / 2 + update_s) * swing_w
