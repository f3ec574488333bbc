"""Do samples still leave where they did at calibration? An early warning that needs no audits, and promises nothing."""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgekit.errors import CalibrationError

__all__ = ["Drift", "Window", "chi2_survival", "homogeneity", "population_stability"]

NOTABLE_PSI = 0.05
"""Half of what is customarily called a moderate shift, for the warning is to be early."""
NOTABLE_P = 1e-3
"""Below this a shift is not put down to chance."""


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """One window of the stream beside the reference.

    Attributes:
        shares: of the samples, that left at each exit.
        psi: population stability index: how large the shift is.
        p_value: of the chi-squared test: whether it can be chance.
    """

    shares: tuple[float, ...]
    psi: float
    p_value: float

    @property
    def notable(self) -> bool:
        """Whether the shift is neither small nor chance."""
        return self.psi >= NOTABLE_PSI and self.p_value < NOTABLE_P


class Drift(msgspec.Struct, kw_only=True):
    """Counts exits in windows, one after the other, and compares each with a reference.

    **No guarantee**: the shares may shift while the loss is in order, and stay while it is not; and of many windows,
    one in a thousand has a p-value below 0.001 by chance alone.

    Attributes:
        reference: samples that left at each exit at calibration; ``None`` takes the first window.
        size: samples of a window.
        counts: of the window that is being filled.
        last: the latest full window that was compared.
        windows: how many were compared.
        notable: how many of those had shifted notably.
    """

    reference: list[int] | None
    counts: list[int]
    size: int = 1000
    last: Window | None = None
    windows: int = 0
    notable: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise CalibrationError(f"a window must have at least one sample, not {self.size}")
        counted = [self.counts] if self.reference is None else [self.counts, self.reference]
        if any(len(each) != len(self.counts) or min(each, default=0) < 0 for each in counted) or not self.counts:
            raise CalibrationError("drift needs one count of samples for each exit, in reference and counts")

    @property
    def warning(self) -> bool:
        """Whether the latest window has shifted notably."""
        return self.last is not None and self.last.notable

    def add(self, exits: NDArray[np.int64]) -> None:
        """Count samples.

        Args:
            exits: ``(samples,) int64``, the exit that each left at.
        """
        if len(exits) == 1:  # a stream, one sample at a time: numpy would cost more than the counting
            self.counts[exits.item()] += 1
        else:
            added = np.bincount(exits, minlength=len(self.counts)).tolist()
            self.counts = [before + more for before, more in zip(self.counts, added, strict=True)]
        if sum(self.counts) >= self.size:
            self._close()

    def _close(self) -> None:
        if self.reference is None:
            self.reference = self.counts
        else:
            self.last = Window(
                shares=tuple(count / sum(self.counts) for count in self.counts),
                psi=population_stability(self.reference, self.counts),
                p_value=homogeneity(self.reference, self.counts),
            )
            self.windows += 1
            self.notable += self.last.notable
        self.counts = [0] * len(self.counts)


def population_stability(reference: ArrayLike, counts: ArrayLike) -> float:
    """``sum_k (p_k - q_k) ln(p_k / q_k)`` of two sets of counts; half a sample is added to each so that none is zero.

    The symmetric Kullback-Leibler divergence (Jeffreys 1946), in credit scoring the population stability index
    (Siddiqi: Credit Risk Scorecards, 2006). Below 0.1 is customarily called stable, above 0.25 a large shift.

    Args:
        reference: ``(exits,)`` samples.
        counts: ``(exits,)`` samples.
    """
    first, second = (np.asarray(each, dtype=np.float64) + 0.5 for each in (reference, counts))
    p, q = first / first.sum(), second / second.sum()
    return float(((p - q) * np.log(p / q)).sum())


def homogeneity(reference: ArrayLike, counts: ArrayLike) -> float:
    """p-value of Pearson's chi-squared test that two sets of counts come from the same shares; 1 where either is empty.

    Both are samples: a small calibration set is not taken for the truth. Exits that nobody took do not count.

    Args:
        reference: ``(exits,)`` samples.
        counts: ``(exits,)`` samples.
    """
    table = np.asarray([reference, counts], dtype=np.float64)
    table = table[:, table.sum(axis=0) > 0]
    rows = table.sum(axis=1, keepdims=True)
    if table.shape[1] < 2 or not rows.all():
        return 1.0
    expected = rows * table.sum(axis=0) / table.sum()
    return chi2_survival(float(((table - expected) ** 2 / expected).sum()), table.shape[1] - 1)


def chi2_survival(x: float, freedom: int) -> float:
    """``P[chi-squared > x]`` with a whole number of degrees of freedom.

    The regularised upper incomplete gamma function ``Q(freedom / 2, x / 2)`` as a finite sum of positive terms, by
    ``Q(a + 1, y) = Q(a, y) + y^a e^-y / Gamma(a + 1)`` from ``Q(1, y) = e^-y`` or ``Q(1/2, y) = erfc(sqrt y)``
    (Abramowitz and Stegun 1964, 26.4.4 and 26.4.5).

    Raises:
        CalibrationError: ``x`` is negative or NaN, or ``freedom`` less than 1.
    """
    if not x >= 0 or freedom < 1:
        raise CalibrationError(f"chi-squared {x} with {freedom} degrees of freedom; give x >= 0 and at least 1")
    y = x / 2
    if y == 0:
        return 1.0
    base = 0.5 if freedom % 2 else 1.0
    start = math.erfc(math.sqrt(y)) if freedom % 2 else math.exp(-y)
    powers = np.arange(base, freedom / 2).tolist()
    return start + math.fsum(math.exp(a * math.log(y) - y - math.lgamma(a + 1)) for a in powers)
