from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as scipy_stats

from edgekit.errors import MeasurementError
from edgekit.stats import (
    conservative_percentile,
    count_far_from_median,
    count_outliers,
    difference_interval,
    independent_samples,
    mean_interval,
    quantile_draws,
    quantile_interval,
    summarize,
)


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


def two_humps(level):
    """Quantile of 70 % N(1, 0.05) and 30 % N(2, 0.05)."""
    below = lambda x: 0.7 * scipy_stats.norm.cdf(x, 1, 0.05) + 0.3 * scipy_stats.norm.cdf(x, 2, 0.05) - level  # noqa: E731
    return optimize.brentq(below, 0, 3)


LATENCIES = {
    "log-normal": (lambda rng, n: rng.lognormal(0, 0.2, n), scipy_stats.lognorm(0.2).ppf),
    "bimodal": (
        lambda rng, n: np.where(rng.random(n) < 0.7, rng.normal(1, 0.05, n), rng.normal(2, 0.05, n)),
        two_humps,
    ),
    "heavy tail": (
        lambda rng, n: 1 + 0.1 * rng.pareto(1.5, n),
        lambda level: 1 + 0.1 * scipy_stats.lomax(1.5).ppf(level),
    ),
}


@pytest.mark.parametrize("level", [0.5, 0.9])
@pytest.mark.parametrize("kind", LATENCIES)
def test_95_percent_intervals_cover_95_percent(kind, level):
    """The median and the 90th percentile of known distributions, 1,000 runs of 400 samples each."""
    draw, quantile = LATENCIES[kind]
    rng, true = np.random.default_rng(20), quantile(level)
    intervals = [quantile_interval(draw(rng, 400), level) for _ in range(1000)]
    covered = sum(low <= true <= high for low, high in intervals)
    assert 930 <= covered <= 970


def drifting(rng, count, *, share=0.9):
    """Normal values of which each is mostly the one before."""
    steps, values = rng.normal(size=count), np.empty(count)
    values[0] = steps[0]
    for index in range(1, count):
        values[index] = share * values[index - 1] + np.sqrt(1 - share**2) * steps[index]
    return values


def test_samples_that_drift_are_worth_fewer_and_get_wider_intervals():
    rng = np.random.default_rng(3)
    runs = [drifting(rng, 2000) for _ in range(200)]
    covered = sum(low <= 0 <= high for low, high in (quantile_interval(run, 0.5) for run in runs))
    assert 180 <= covered <= 198  # a bootstrap of single samples covers about 40 of 100
    assert np.mean([independent_samples(run, 0.5) for run in runs]) < 300
    assert np.mean([independent_samples(rng.permutation(run), 0.5) for run in runs]) > 1700
    means = sum(low <= 0 <= high for low, high in (mean_interval(run) for run in runs))
    assert 176 <= means <= 198


@given(st.integers(8, 300), st.sampled_from([0.5, 0.9]), st.integers(0, 2**32 - 1))
def test_independent_samples_are_no_more_than_there_are(size, level, seed):
    samples = np.random.default_rng(seed).integers(0, 5, size).astype(np.float64)
    assert 0 < independent_samples(samples, level) <= size


def test_a_constant_is_known_exactly():
    samples = np.full(100, 3.0)
    assert independent_samples(samples, 0.5) == 100
    assert quantile_interval(samples, 0.5) == (3.0, 3.0)
    assert mean_interval(samples) == (3.0, 3.0)


def test_too_few_samples_have_no_interval():
    assert quantile_interval(np.arange(6.0), 0.5) is None
    assert quantile_interval(np.arange(25.0), 0.9) is None
    assert mean_interval(np.array([1.0])) == (1.0, 1.0)


def test_draws_lie_as_the_interval_says():
    rng = np.random.default_rng(5)
    samples = rng.lognormal(size=500)
    worth = independent_samples(samples, 0.9)
    drawn = quantile_draws(np.sort(samples), 0.9, independent=worth, draws=20_000, rng=rng)
    assert np.quantile(drawn, [0.025, 0.975]) == pytest.approx(quantile_interval(samples, 0.9), rel=0.02)


def test_the_difference_of_two_runs_is_covered():
    rng, covered = np.random.default_rng(6), 0
    for _ in range(300):
        found = difference_interval(1.1 * rng.lognormal(0, 0.1, 300), rng.lognormal(0, 0.1, 300))
        covered += found.low <= 0.1 <= found.high
    assert 276 <= covered <= 297


def test_the_mean_agrees_with_scipys_bootstrap():
    samples = np.random.default_rng(2).lognormal(size=400)
    low, high = mean_interval(samples)
    golden = scipy_stats.bootstrap(
        (samples,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(3)
    ).confidence_interval
    width = golden.high - golden.low
    assert low == pytest.approx(golden.low, abs=0.1 * width)
    assert high == pytest.approx(golden.high, abs=0.1 * width)


def test_far_from_the_median_by_hand():
    # The median is 3, distances 2 1 0 1 97, their median 1: the fence is 14.8 away.
    assert count_far_from_median(np.array([1, 2, 3, 4, 100.0])) == 1
    assert count_far_from_median(np.array([1, 2, 3, 4, 17.0])) == 0


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
