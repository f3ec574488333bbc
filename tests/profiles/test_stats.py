from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from edgekit.errors import MeasurementError
from edgekit.profiles.stats import bootstrap_interval, conservative_percentile, count_outliers, summarize


def test_summary_by_hand():
    summary = summarize([4_000, 1_000, 2_000, 3_000, 10_000])
    assert summary.samples == 5
    assert summary.min_s == pytest.approx(1e-6)
    assert summary.median_s == pytest.approx(3e-6)
    assert summary.mean_s == pytest.approx(4e-6)
    assert summary.sd_s == pytest.approx(np.sqrt((0 + 9 + 4 + 1 + 36) / 4) * 1e-6)
    assert summary.p90_s is None
    assert summary.p99_s is None


@pytest.mark.parametrize(("level", "needed"), [(0.90, 64), (0.95, 130), (0.99, 662), (0.999, 6636)])
def test_a_percentile_needs_as_many_samples_as_mlperf_asks(level, needed):
    samples = np.arange(needed, dtype=np.float64)
    assert conservative_percentile(samples[1:], level) is None
    assert conservative_percentile(samples, level) == needed - 1


@pytest.mark.parametrize(("queries", "discarded"), [(64, 0), (2048, 172), (2116, 178), (2145, 181), (7469, 685)])
def test_the_90th_percentile_is_the_sample_that_loadgen_reports(queries, discarded):
    """Recorded: published logs of MLPerf's load generator ("Would discard N highest latency queries")."""
    samples = np.random.default_rng(0).permutation(queries).astype(np.float64)
    assert conservative_percentile(samples, 0.90) == queries - 1 - discarded


@given(st.integers(64, 3000), st.floats(0.5, 0.9))
def test_the_rank_is_the_smallest_that_the_binomial_allows(size, level):
    found = conservative_percentile(np.arange(size, dtype=np.float64), level)
    assert found is not None
    rank = int(found)  # one below the reported one, counted from 1
    too_small = scipy_stats.binom.cdf(size - rank, size, 1 - level)  # at least `rank` samples below the percentile
    assert too_small <= 0.01 + 1e-12
    assert scipy_stats.binom.cdf(size - rank + 1, size, 1 - level) > 0.01 - 1e-12


def test_it_is_seldom_below_the_true_percentile():
    rng = np.random.default_rng(1)
    true = scipy_stats.expon.ppf(0.9)
    below = sum((conservative_percentile(rng.exponential(size=200), 0.9) or 0.0) < true for _ in range(2000))
    assert below <= 0.01 * 2000 + 3 * np.sqrt(2000 * 0.01 * 0.99)


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_bootstrap_agrees_with_scipy(statistic):
    samples = np.random.default_rng(2).lognormal(size=400)
    low, high = bootstrap_interval(samples, statistic, resamples=4000)
    golden = scipy_stats.bootstrap(
        (samples,), statistic, method="percentile", n_resamples=4000, rng=np.random.default_rng(3)
    ).confidence_interval
    width = golden.high - golden.low
    assert low == pytest.approx(golden.low, abs=0.1 * width)
    assert high == pytest.approx(golden.high, abs=0.1 * width)


def test_bootstrap_in_pieces_covers_every_resample(monkeypatch):
    seen = []
    monkeypatch.setattr("edgekit.profiles.stats.DRAWN_AT_ONCE", 70)

    def counted(drawn, *, axis):
        seen.append(drawn.shape)
        return drawn.mean(axis=axis)

    bootstrap_interval(np.arange(10.0), counted, resamples=23)
    assert seen == [(7, 10), (7, 10), (7, 10), (2, 10)]


def test_the_bootstrap_repeats_with_its_seed():
    samples = list(np.random.default_rng(4).integers(1000, 2000, 100))
    assert summarize(samples, seed=5) == summarize(samples, seed=5)
    assert summarize(samples, seed=5) != summarize(samples, seed=6)


def test_outliers_by_hand_are_counted_and_kept():
    # Quartiles 2 and 4, so the fences are -4 and 10.
    samples = np.array([1, 2, 3, 4, 10.0])
    assert count_outliers(samples) == 0
    assert count_outliers(np.array([1, 2, 3, 4, 10.1])) == 1
    assert summarize([1000] * 99 + [50_000]).outliers == 1
    assert summarize([1000] * 99 + [50_000]).mean_s == pytest.approx(1.49e-6)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=200))
def test_order_holds(latency_ns):
    summary = summarize(latency_ns)
    slack = 1e-9 * max(1.0, summary.mean_s)
    assert summary.min_s <= summary.median_low_s + slack
    assert summary.median_low_s <= summary.median_high_s
    assert summary.mean_low_s <= summary.mean_high_s
    assert 0 <= summary.outliers <= summary.samples == len(latency_ns)
    if summary.p90_s is not None:
        assert summary.median_s <= summary.p90_s + slack


@pytest.mark.parametrize("bad", [[], [1, -1]])
def test_no_samples_or_a_clock_that_ran_backwards(bad):
    with pytest.raises(MeasurementError, match="measure again"):
        summarize(bad)
