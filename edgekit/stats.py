"""Statistics of latency samples: nothing is dropped, and nothing is told that the samples cannot carry.

Samples of one run are not independent: clocks drift, other work comes and goes. Intervals therefore count how many
independent samples a run is worth (:func:`independent_samples`), and are no narrower than that many would allow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekit.distributions import beta_quantile, binomial_quantile
from edgekit.errors import MeasurementError
from edgekit.measured import Interval, LatencySummary

__all__ = [
    "conservative_percentile",
    "count_far_from_median",
    "count_outliers",
    "difference_interval",
    "independent_samples",
    "mean_interval",
    "median_half_width",
    "quantile_draws",
    "quantile_interval",
    "summarize",
]

CONFIDENCE = 0.95
"""Of the intervals."""
PERCENTILE_CONFIDENCE = 0.99
"""That a published percentile is no smaller than the true one."""
RESAMPLES = 2000
MOST_BLOCKS = 1000
"""Blocks that a mean's bootstrap draws from: more cost time and change nothing."""
DRAWN_AT_ONCE = 1_000_000
"""Values in memory while resampling."""
FEWEST = 8
"""Samples below which no interval is given."""
FAR = 14.826
"""Median distances from the median that make a sample far: ten standard deviations of a normal one."""


def summarize(latency_ns: Sequence[int] | NDArray[np.int64], *, seed: int = 0) -> LatencySummary:
    """Summary of raw samples.

    Args:
        latency_ns: ``(samples,)`` nanoseconds, in the order in which they were taken.
        seed: of the bootstrap.

    Raises:
        MeasurementError: there are no samples, or one is negative (a clock that ran backwards).
    """
    samples = np.asarray(latency_ns, dtype=np.float64) * 1e-9
    if samples.size == 0 or samples.min() < 0:
        raise MeasurementError("latency samples must be at least one and not negative; measure again")
    whole = (float(samples.min()), float(samples.max()))
    median_low, median_high = quantile_interval(samples, 0.5) or whole
    mean_low, mean_high = mean_interval(samples, seed=seed)
    p90_low, p90_high = quantile_interval(samples, 0.9) or (None, None)
    p90 = conservative_percentile(samples, 0.90)
    return LatencySummary(
        samples=int(samples.size),
        min_s=whole[0],
        median_s=float(np.median(samples)),
        mean_s=float(samples.mean()),
        sd_s=float(samples.std(ddof=1)) if samples.size > 1 else 0.0,
        p90_s=p90,
        p95_s=conservative_percentile(samples, 0.95),
        p99_s=conservative_percentile(samples, 0.99),
        p999_s=conservative_percentile(samples, 0.999),
        median_low_s=median_low,
        median_high_s=median_high,
        mean_low_s=mean_low,
        mean_high_s=mean_high,
        p90_low_s=None if p90 is None else p90_low,
        p90_high_s=None if p90 is None else p90_high,
        confidence=CONFIDENCE,
        outliers=count_outliers(samples),
        far_from_median=count_far_from_median(samples),
        independent=independent_samples(samples, 0.5),
    )


def conservative_percentile(
    samples: NDArray[np.float64], level: float, *, confidence: float = PERCENTILE_CONFIDENCE
) -> float | None:
    """An order statistic that is at least the true percentile with the confidence asked for.

    Of ``n`` independent samples, the ``j``-th smallest lies below the percentile of level ``p`` only if at least ``j``
    samples do, which has probability ``P(Bin(n, p) >= j)``. MLPerf Inference's early stopping (inference_rules.adoc,
    tolerance 0) takes the smallest ``j`` for which that is at most ``1 - confidence`` and reports the next larger
    sample. At 99 % confidence there is one from 64 samples on for the 90th percentile, from 662 for the 99th.

    Args:
        samples: ``(samples,) float64``.
        level: ``p``, between 0 and 1.
        confidence: that the answer is not too small.

    Returns:
        That sample, or ``None`` when there are too few.
    """
    rank = binomial_quantile(confidence, samples.size, level) + 2
    if rank > samples.size:
        return None
    return float(np.partition(samples, rank - 1)[rank - 1])


def independent_samples(samples: NDArray[np.float64], level: float) -> float:
    """How many independent samples a run is worth to the quantile of a level; at most as many as there are.

    A quantile's variance is that of the mean of "at most the quantile", 0 or 1 for each sample, over the square of the
    density (Bahadur, Ann. Math. Stat. 37, 1966). What dependence adds to the variance of that mean is the sum of its
    autocorrelations, taken up to where the sum of two in a row is no longer positive (Geyer, Stat. Sci. 7, 1992).

    Args:
        samples: ``(samples,) float64`` in the order in which they were taken.
        level: between 0 and 1.
    """
    return samples.size / _dependence((samples <= np.quantile(samples, level)).astype(np.float64))


def _dependence(series: NDArray[np.float64]) -> float:
    """Samples in a row that are worth one: 1 where they are independent, never less."""
    count = series.size
    centred = series - series.mean()
    if count < FEWEST or not np.any(centred):
        return 1.0
    spectrum = np.abs(np.fft.rfft(centred, 1 << (2 * count - 1).bit_length())) ** 2
    correlations = np.fft.irfft(spectrum)[: count - count % 2]
    pairs = (correlations / correlations[0]).reshape(-1, 2).sum(axis=1)
    ends = np.flatnonzero(pairs <= 0)
    return max(1.0, 2 * float(pairs[: ends[0] if ends.size else None].sum()) - 1)


def quantile_interval(
    samples: NDArray[np.float64], level: float, *, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Distribution-free confidence interval of a quantile, from order statistics.

    The share of a distribution that lies below a quantile's order statistic is beta distributed (David and Nagaraja,
    Order Statistics, 2003, section 2.1); with Jeffreys' halves the interval is neither too wide nor too narrow on
    average. The number of samples is that of :func:`independent_samples`.

    Args:
        samples: ``(samples,) float64`` in the order in which they were taken.
        level: of the quantile, between 0 and 1.
        confidence: of the interval.

    Returns:
        Its ends, or ``None`` where there are too few samples for one that is not the whole range.
    """
    worth = independent_samples(samples, level)
    if worth * min(level, 1 - level) < 3 or samples.size < FEWEST:
        return None
    places = [beta_quantile(end, *_beta(worth, level)) for end in ((1 - confidence) / 2, (1 + confidence) / 2)]
    low, high = np.quantile(samples, places, method="hazen")
    return float(low), float(high)


def median_half_width(samples: NDArray[np.float64]) -> float:
    """Half of the median's interval (:func:`quantile_interval`) as a share of the median; infinite if not known.

    Args:
        samples: ``(samples,) float64`` in the order in which they were taken.
    """
    found, middle = quantile_interval(samples, 0.5), float(np.median(samples))
    return (found[1] - found[0]) / 2 / middle if found is not None and middle > 0 else math.inf


def quantile_draws(
    ordered: NDArray[np.float64], level: float, *, independent: float, draws: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Where the true quantile may lie: ``(draws,) float64``, whose middle is :func:`quantile_interval`.

    Args:
        ordered: ``(samples,) float64``, ascending.
        level: of the quantile.
        independent: samples that they are worth.
        draws: how many.
        rng: of the draws.
    """
    found: NDArray[np.float64] = np.quantile(ordered, rng.beta(*_beta(independent, level), draws), method="hazen")
    return found


def _beta(independent: float, level: float) -> tuple[float, float]:
    return independent * level + 0.5, independent * (1 - level) + 0.5


def difference_interval(
    after: NDArray[np.float64],
    before: NDArray[np.float64],
    *,
    level: float = 0.5,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """A quantile of ``after`` less that of ``before``, with its interval.

    Args:
        after: ``(samples,) float64`` in the order in which they were taken.
        before: likewise; need not be as many.
        level: of the quantile.
        confidence: of the interval.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    drawn = [
        quantile_draws(
            np.sort(samples), level, independent=independent_samples(samples, level), draws=RESAMPLES, rng=rng
        )
        for samples in (after, before)
    ]
    low, high = np.quantile(drawn[0] - drawn[1], [(1 - confidence) / 2, (1 + confidence) / 2])
    value = float(np.quantile(after, level) - np.quantile(before, level))
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))


def mean_interval(
    samples: NDArray[np.float64], *, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of the mean (Efron, 1979) over blocks in time, long enough to be independent of each other.

    Args:
        samples: ``(samples,) float64`` in the order in which they were taken.
        confidence: share of the resampled means that lie inside.
        seed: of the draws.
    """
    # Blocks of one dependence length would still lean on each other at their ends.
    length = max(math.ceil(samples.size / MOST_BLOCKS), round(3 * (_dependence(samples) - 1)), 1)
    count = samples.size // length
    if count < 2:
        return float(samples.min()), float(samples.max())
    blocks = samples[samples.size - count * length :].reshape(count, length).mean(axis=1)
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // count)
    sizes = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    drawn = np.concatenate([blocks[rng.integers(0, count, (size, count))].mean(axis=1) for size in sizes])
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def count_outliers(samples: NDArray[np.float64]) -> int:
    """How many samples lie beyond Tukey's outer fences, three interquartile ranges from the quartiles."""
    low, high = np.quantile(samples, [0.25, 0.75])
    reach = 3 * (high - low)
    return int(np.count_nonzero((samples < low - reach) | (samples > high + reach)))


def count_far_from_median(samples: NDArray[np.float64]) -> int:
    """How many samples are farther from the median than :data:`FAR` times the median distance (hyperfine)."""
    distances = np.abs(samples - np.median(samples))
    return int(np.count_nonzero(distances > FAR * np.median(distances)))
