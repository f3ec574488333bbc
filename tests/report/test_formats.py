"""Numbers as people read them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.report import formats
from edgekit.report.formats import NONE


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, NONE),
        (0.0, "0.000 µs"),
        (12.34e-9, "0.012 µs"),
        (999.9e-6, "999.9 µs"),
        (1e-3, "1.000 ms"),
        (1.23456e-3, "1.235 ms"),
        (9.9996e-3, "10.00 ms"),
        (0.0812, "81.20 ms"),
        (2.0, "2.000 s"),
        (1234.0, "1234 s"),
    ],
)
def test_duration(seconds, text):
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(None, NONE), (0, "0"), (999, "999"), (1000, "1 k"), (12_345_678, "12.3 M"), (3.2e9, "3.2 G")]
)
def test_si(count, text):
    assert formats.si(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(None, NONE), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (141 * 2**20, "141.0 MiB")]
)
def test_size(count, text):
    assert formats.size(count) == text


def test_percent_points_and_energy():
    assert formats.percent(0.1234) == "12.3 %"
    assert formats.percent(None) == NONE
    assert formats.points(-0.007) == "−0.7 points"
    assert formats.points(0.0123) == "+1.2 points"
    assert formats.energy(0.0023) == "2.300 mJ"


MS = formats.Unit(1e-3, "ms")


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (4.6e-3, 4.5e-3, 4.7e-3, "4.600 ±0.10"),
        (4.6e-3, 4.599e-3, 4.601e-3, "4.600 ±0.001"),
        (4.6e-3, 4.6e-3 - 2e-7, 4.6e-3 + 2e-7, "4.600 ±0.0002"),
        (46e-3, 44e-3, 48e-3, "46.00 ±2.0"),
        (460e-3, 440e-3, 480e-3, "460.0 ±20"),
        (4.6e-3, None, None, "4.600"),
        (None, None, None, NONE),
    ],
)
def test_plus_minus(value, low, high, shown):
    assert formats.plus_minus(value, low, high, MS) == shown


def test_ranged():
    assert formats.ranged(1.2e-3, 1.3e-3, MS) == "1.200–1.300"
    assert formats.ranged(-1.2e-3, 1.3e-3, MS) == "−1.200 to 1.300"
    assert formats.ranged(None, 1.3e-3, MS) == NONE


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2026-11-20T10:04:12+00:00", "2026-11-20 10:04 UTC"),
        ("2026-11-20T10:04:12Z", "2026-11-20 10:04 UTC"),
        ("2026-11-20T12:04:12+02:00", "2026-11-20 10:04 UTC"),
        ("yesterday", "yesterday"),
    ],
)
def test_moment(text, shown):
    assert formats.moment(text) == shown


@given(st.floats(min_value=1e-9, max_value=1e6))
def test_a_duration_reads_back(seconds):
    value, symbol = formats.duration(seconds).split()
    scale = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}[symbol]
    assert math.isclose(float(value) * scale, seconds, rel_tol=6e-4, abs_tol=0.6e-9)


@given(st.floats(min_value=1.0, max_value=1e15))
def test_si_reads_back(count):
    value, _, prefix = formats.si(count).partition(" ")
    scale = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[prefix]
    assert math.isclose(float(value) * scale, count, rel_tol=6e-3, abs_tol=0.5)
