"""Differences of one tensor between two runtimes, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgekit.same_inputs import KEPT, Differences

NAN, INF = math.nan, math.inf


def test_differences_by_hand():
    found = Differences()
    found.add(np.array([[1, 2]], np.float32), np.array([[1, 2.5]], np.float32))
    found.add(np.array([-4], np.float32), np.array([-4], np.float32))
    spread = found.spread()
    assert (spread.scale, spread.largest, spread.median, spread.elements) == (4, 0.5, 0, 3)
    assert spread.p99 == pytest.approx(0.98 * 0.5)  # between 0 and 0.5, at 0.99 of the way from the first to the last
    assert spread.relative == 0.125


@pytest.mark.parametrize("dtype", [np.bool_, np.int64, np.uint8, np.float16, np.complex64])
def test_differences_of_any_dtype(dtype):
    found = Differences()
    found.add(np.array([0, 1, 1], dtype), np.array([0, 0, 1], dtype))
    spread = found.spread()
    assert (spread.scale, spread.largest, spread.median, spread.unlike) == (1, 1, 0, 0)


def test_what_is_not_finite_is_counted_and_not_measured():
    found = Differences()
    found.add(np.array([NAN, INF, -INF, NAN, INF, 2, 3]), np.array([NAN, INF, INF, 1, 1, NAN, 3.5]))
    spread = found.spread()
    assert (spread.unlike, spread.elements, spread.largest, spread.scale) == (4, 1, 0.5, 3)


def test_nothing_finite_and_nothing_at_all():
    found = Differences()
    found.add(np.array([NAN]), np.array([NAN]))
    spread = found.spread()
    assert (spread.elements, spread.unlike, spread.largest, spread.p99, spread.relative) == (0, 0, 0, 0, 0)


def test_a_reference_of_zeros_has_no_scale():
    found = Differences()
    found.add(np.zeros(3), np.array([0, 1e-9, 0]))
    assert found.spread().relative is None
    found = Differences()
    found.add(np.zeros(3), np.zeros(3))
    assert found.spread().relative == 0


def test_of_a_large_tensor_evenly_spaced_elements_give_the_percentiles_and_all_the_largest():
    expected = np.zeros(4 * KEPT + 3)
    given = expected + np.linspace(0, 1, len(expected))
    given[1] = 7  # at no kept place
    found = Differences()
    found.add(expected, given)
    spread = found.spread()
    assert spread.largest == 7
    assert spread.median == pytest.approx(0.5, abs=1e-3)
    assert spread.p99 == pytest.approx(0.99, abs=1e-3)
