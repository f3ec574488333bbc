"""Ranges against quantisation done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.exporters.quantize_ranges import BINS, LEVELS, activation_ranges, least_error_range, shared


def rounding_error(values, low, high):
    """Mean square error of values in 255 steps between the ends, as hardware does it."""
    step = (high - low) / LEVELS
    zero = np.rint(-low / step)
    levels = np.clip(np.rint(values / step) + zero, 0, LEVELS)
    return float((((levels - zero) * step - values) ** 2).mean())


@pytest.fixture(params=["relu", "both signs", "heavy tail"])
def values(request):
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(50_000).astype(np.float32)
    if request.param == "relu":
        return np.maximum(drawn, 0)
    if request.param == "heavy tail":
        return (drawn**3 * np.where(rng.random(50_000) < 1e-3, 20, 1)).astype(np.float32)
    return drawn


def test_the_range_found_errs_about_as_little_as_the_best_of_many(values):
    ends = (min(0.0, float(values.min())), float(values.max()))
    counts = np.histogram(values, bins=BINS, range=ends)[0]
    low, high = least_error_range(counts, ends)
    tried = [rounding_error(values, ends[0] * part, ends[1] * part) for part in np.linspace(0.2, 1.0, 200)]
    assert ends[0] <= low <= 0 < high <= ends[1]
    assert rounding_error(values, low, high) <= 1.1 * min(tried)


def test_an_outlier_does_not_cost_everyone_else_their_precision():
    values = np.concatenate([np.linspace(-1, 1, 100_000), [40.0]]).astype(np.float32)
    counts = np.histogram(values, bins=BINS, range=(-1, 40))[0]
    low, high = least_error_range(counts, (-1.0, 40.0))
    assert rounding_error(values, low, high) < rounding_error(values, -1.0, 40.0)


def test_ranges_hold_zero_and_leave_out_what_is_not_finite():
    feeds = [{"x": np.array([[2.0, 3.0]], np.float32)}, {"x": np.array([[np.nan, np.inf]], np.float32)}]
    made = activation_ranges(lambda feed: {"y": feed["x"], "z": feed["x"] * np.nan}, feeds)
    assert made["z"] == (0.0, 0.0)
    assert made["y"][0] == 0.0
    assert 2.0 < made["y"][1] <= 3.0


def test_symmetric_ranges_are_those_of_least_error_about_zero(values):
    made = activation_ranges(lambda feed: feed, [{"x": values}], symmetric=True)["x"]
    assert made[0] == -made[1]
    most = float(np.abs(values).max())
    tried = [rounding_error(values, -most * part, most * part) for part in np.linspace(0.2, 1.0, 200)]
    assert rounding_error(values, *made) <= 1.1 * min(tried)


def test_a_group_has_one_range_that_holds_all():
    ranges = {"a": (0.0, 1.0), "b": (-2.0, 0.5), "c": (0.0, 9.0)}
    assert shared(ranges, [["a", "b", "no activation"]]) == {"a": (-2.0, 1.0), "b": (-2.0, 1.0), "c": (0.0, 9.0)}
