"""Statistics of latency samples: nothing is dropped, and nothing is told that the samples cannot carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MeasurementError
from edgekit.records import LatencySummary

__all__ = ["bootstrap_interval", "conservative_percentile", "count_outliers", "summarize"]

CONFIDENCE = 0.95
"""Of the bootstrap intervals."""
PERCENTILE_CONFIDENCE = 0.99
"""That a published percentile is no smaller than the true one."""
RESAMPLES = 1000
DRAWN_AT_ONCE = 1_000_000
"""Samples in memory while resampling."""


def summarize(latency_ns: Sequence[int] | NDArray[np.int64], *, seed: int = 0) -> LatencySummary:
    """Summary of raw samples.

    Args:
        latency_ns: ``(samples,)`` nanoseconds, in any order.
        seed: of the bootstrap.

    Raises:
        MeasurementError: there are no samples, or one is negative (a clock that ran backwards).
    """
    samples = np.asarray(latency_ns, dtype=np.float64) * 1e-9
    if samples.size == 0 or samples.min() < 0:
        raise MeasurementError("latency samples must be at least one and not negative; measure again")
    median_low, median_high = bootstrap_interval(samples, np.median, seed=seed)
    mean_low, mean_high = bootstrap_interval(samples, np.mean, seed=seed)
    return LatencySummary(
        samples=int(samples.size),
        min_s=float(samples.min()),
        median_s=float(np.median(samples)),
        mean_s=float(samples.mean()),
        sd_s=float(samples.std(ddof=1)) if samples.size > 1 else 0.0,
        p90_s=conservative_percentile(samples, 0.90),
        p99_s=conservative_percentile(samples, 0.99),
        median_low_s=median_low,
        median_high_s=median_high,
        mean_low_s=mean_low,
        mean_high_s=mean_high,
        confidence=CONFIDENCE,
        outliers=count_outliers(samples),
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
    from scipy.stats import binom

    rank = int(binom.isf(1 - confidence, samples.size, level)) + 2
    if rank > samples.size:
        return None
    return float(np.partition(samples, rank - 1)[rank - 1])


def bootstrap_interval(
    samples: NDArray[np.float64],
    statistic: Callable[..., NDArray[np.float64]],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap (Efron, 1979): the middle of the statistic over samples drawn with replacement.

    Args:
        samples: ``(samples,) float64``.
        statistic: takes such arrays and ``axis``, as ``np.median`` does.
        confidence: share of the resampled statistics that lie inside.
        resamples: how many are drawn.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // samples.size)
    counts = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    drawn = np.concatenate(
        [statistic(samples[rng.integers(0, samples.size, (count, samples.size))], axis=1) for count in counts]
    )
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def count_outliers(samples: NDArray[np.float64]) -> int:
    """How many samples lie beyond Tukey's outer fences, three interquartile ranges from the quartiles."""
    low, high = np.quantile(samples, [0.25, 0.75])
    reach = 3 * (high - low)
    return int(np.count_nonzero((samples < low - reach) | (samples > high + reach)))
