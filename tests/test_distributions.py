"""Held against SciPy, which a device does not have."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from edgekit.distributions import (
    beta_cdf,
    beta_quantile,
    binomial_cdf,
    binomial_quantile,
    binomial_sf,
    bisect,
    first,
    t_quantile,
)

shares = st.floats(1e-6, 1 - 1e-6)
shapes = st.floats(-1, 6).map(lambda power: 10**power)


@given(shares, shapes, shapes)
def test_beta_cdf(x, a, b):
    assert beta_cdf(x, a, b) == pytest.approx(stats.beta.cdf(x, a, b), rel=1e-7, abs=1e-12)


@given(shares, shapes, shapes)
def test_near_the_mean_where_the_continued_fraction_is_slowest(share, a, b):
    x = float(stats.beta.ppf(share, a, b))
    assert beta_cdf(x, a, b) == pytest.approx(stats.beta.cdf(x, a, b), rel=1e-6, abs=1e-12)


def test_beta_cdf_at_and_beyond_the_ends():
    assert [beta_cdf(x, 2.5, 3.0) for x in (-0.1, 0.0, 1.0, 1.1)] == [0.0, 0.0, 1.0, 1.0]


@given(st.floats(1e-4, 1 - 1e-4), st.floats(0, 6).map(lambda power: 10**power), st.floats(0.01, 0.99))
def test_beta_quantile(share, worth, level):
    a, b = worth * level + 0.5, worth * (1 - level) + 0.5
    assert beta_quantile(share, a, b) == pytest.approx(stats.beta.ppf(share, a, b), rel=1e-7, abs=1e-12)


@given(st.floats(0.5, 1 - 1e-6), st.floats(0, 6).map(lambda power: 10**power))
def test_t_quantile(share, freedom):
    assert t_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-6, abs=1e-7)


@given(st.integers(1, 100_000), st.floats(1e-4, 1 - 1e-4), st.floats(0.001, 0.999))
def test_binomial_quantile(n, share, p):
    found = binomial_quantile(share, n, p)
    assert stats.binom.cdf(found, n, p) >= share - 1e-9
    assert found == 0 or stats.binom.cdf(found - 1, n, p) < share + 1e-9


@given(st.integers(1, 100_000), shares, st.data())
def test_binomial_tails(n, p, data):
    k = data.draw(st.integers(0, n))
    assert binomial_cdf(k, n, p) == pytest.approx(stats.binom.cdf(k, n, p), rel=1e-9, abs=1e-12)
    assert binomial_sf(k, n, p) == pytest.approx(stats.binom.sf(k, n, p), rel=1e-9, abs=1e-12)


@given(st.integers(-5, 10_000), st.integers(-5, 10_000))
def test_first(threshold, above):
    assert first(lambda n: n >= threshold, above=above) == max(threshold, above + 1)


@given(st.floats(0.05, 20))
def test_bisect_finds_the_last_bit(where):
    assert bisect(lambda x: x < where, low=0.01, high=21) == where


def test_bisect_ends_at_an_end():
    assert bisect(lambda x: True, low=0.05, high=20) == 20
    assert bisect(lambda x: False, low=0.05, high=20) == pytest.approx(0.05, rel=1e-12)
    assert bisect(lambda x: False) < math.ulp(1.0)
