"""Probabilities and quantiles of a few distributions, with the standard library and numpy: a device has no SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

__all__ = [
    "beta_cdf",
    "beta_quantile",
    "binomial_cdf",
    "binomial_quantile",
    "binomial_sf",
    "bisect",
    "first",
    "t_quantile",
]

TINY = 1e-300
"""In place of a 0 that would be divided by (Lentz's method)."""
ENOUGH = 1e-15
"""Relative change at which a continued fraction has converged."""


def first(fits: Callable[[int], bool], *, above: int) -> int:
    """The smallest whole number greater than ``above`` that fits, where all greater ones do too."""
    step = 1
    while not fits(above + step):
        step *= 2
    low, high = above + step // 2, above + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def bisect(below: Callable[[float], bool], *, low: float = 0.0, high: float = 1.0) -> float:
    """Where ``below`` turns false between two ends, to the last bit; the upper end where it never does."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if below(middle) else (low, middle)
    return high


def binomial_cdf(k: int, n: int, p: float) -> float:
    """``P[Bin(n, p) <= k]``, with a relative error of about 1e-12.

    The probability of ``k`` itself is Loader's (Fast and Accurate Computation of Binomial Probabilities, 2000); the
    others follow by ratios of neighbours.
    """
    if k >= n:
        return 1.0
    if k < n * p:
        return _lower_tail(k, n, p, 1 - p)
    return 1 - _lower_tail(n - k - 1, n, 1 - p, p)


def binomial_sf(k: int, n: int, p: float) -> float:
    """``P[Bin(n, p) > k]``, likewise."""
    if k >= n:
        return 0.0
    if k < n * p:
        return 1 - _lower_tail(k, n, p, 1 - p)
    return _lower_tail(n - k - 1, n, 1 - p, p)


def binomial_quantile(probability: float, n: int, p: float) -> int:
    """The smallest ``k`` with ``P[Bin(n, p) <= k] >= probability``."""
    return first(lambda k: binomial_sf(k, n, p) <= 1 - probability, above=-1)


def beta_cdf(x: float, a: float, b: float) -> float:
    """``I_x(a, b)``, the regularized incomplete beta function: ``P[Beta(a, b) <= x]``.

    By its continued fraction (NIST Digital Library of Mathematical Functions, 8.17.22), on the side of the mean where
    it converges fast, with Lentz's method.

    Args:
        x: from 0 to 1.
        a: positive.
        b: positive.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    logarithm = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or TINY)
    value, m = d, 0
    while True:
        m += 1
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = value
        for term in (even, odd):
            d = 1 / (1 + term * d or TINY)
            c = 1 + term / c or TINY
            value *= c * d
        if abs(value - before) <= ENOUGH * abs(value):
            return math.exp(logarithm) * value / a


def beta_quantile(probability: float, a: float, b: float) -> float:
    """The ``x`` with ``P[Beta(a, b) <= x] = probability``; both parameters positive."""
    return bisect(lambda x: beta_cdf(x, a, b) < probability)


def t_quantile(probability: float, freedom: float) -> float:
    """Of Student's distribution: ``P[|T| > t] = I_{v / (v + t^2)}(v / 2, 1 / 2)`` with ``v`` degrees of freedom.

    Args:
        probability: from 0.5 to below 1.
        freedom: positive, need not be whole.
    """
    share = beta_quantile(2 * (1 - probability), freedom / 2, 0.5)
    return math.sqrt(freedom * (1 - share) / share)


def _lower_tail(k: int, n: int, p: float, q: float) -> float:
    """``P[Bin(n, p) <= k]`` for ``k`` up to about the mean, ``q = 1 - p``: the terms from ``k`` down to negligible."""
    terms = int(10 * math.sqrt(n * p * q)) + 100
    j = np.arange(k, max(k - terms, 0), -1, dtype=np.float64)
    ratios = j * q / ((n - j + 1) * p)  # P[Bin = j - 1] / P[Bin = j]
    return min(1.0, _binomial_pmf(k, n, p, q) * (1 + float(np.cumprod(ratios).sum())))


def _binomial_pmf(k: int, n: int, p: float, q: float) -> float:
    """``P[Bin(n, p) = k]`` for ``k < n``, by Loader 2000, equations 4 to 6: no large logarithms that cancel."""
    if k == 0:
        return math.exp(n * (math.log1p(-p) if p < q else math.log(q)))
    exponent = (
        _stirling_error(n) - _stirling_error(k) - _stirling_error(n - k) - _deviance(k, n * p) - _deviance(n - k, n * q)
    )
    return math.exp(exponent) * math.sqrt(n / (2 * math.pi * k * (n - k)))


def _stirling_error(n: int) -> float:
    """``ln n! - ln(sqrt(2 pi n) (n / e)^n)``."""
    if n < 16:
        return math.lgamma(n + 1) - (n + 0.5) * math.log(n) + n - 0.5 * math.log(2 * math.pi)
    square = float(n * n)
    return (1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - 1 / 1188 / square) / square) / square) / square) / n


def _deviance(x: float, mean: float) -> float:
    """``x ln(x / mean) + mean - x``; by a series where the two are close and would cancel."""
    if abs(x - mean) >= 0.1 * (x + mean):
        return x * math.log(x / mean) + mean - x
    ratio = (x - mean) / (x + mean)
    total, term = (x - mean) * ratio, 2 * x * ratio
    for power in range(3, 1000, 2):
        term *= ratio * ratio
        if total == (total := total + term / power):
            break
    return total
