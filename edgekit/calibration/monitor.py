"""Does the mean loss still keep to its target? Sequential tests that may be looked at after every audit."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgekit.calibration.risk import require_share
from edgekit.errors import CalibrationError

__all__ = ["Detector", "Mean", "Monitor", "checked_losses"]

BETS = 8
"""How many bets the mixture is made of. More gain nothing that can be measured: the first alarm of the best single bet
comes only a little earlier (tests/calibration/test_monitor.py)."""
STEP = 1e-12
"""Width to which the bounds of a mean are narrowed."""


class Monitor(msgspec.Struct, kw_only=True):
    """An e-process against "the mean loss is at most epsilon": alarm when it has grown to ``1 / alpha``.

    ``M_t = mean_j prod_{i <= t} (1 + nu_j (x_i - epsilon))`` over a fixed grid of ``nu_j`` is a nonnegative
    supermartingale while ``E[x_t | past] <= epsilon``, so it *ever* reaches ``1 / alpha`` with probability at most
    ``alpha``, however long the stream (Ville 1939; Waudby-Smith and Ramdas: Estimating means of bounded random
    variables by betting, 2024). For losses of 0 and 1, ``nu = (r - epsilon) / (epsilon (1 - epsilon))``
    makes it the likelihood ratio of rate ``r`` against ``epsilon``; it then takes about
    ``ln(1 / alpha) / KL(r || epsilon)`` losses to notice rate ``r``, and the mixture some ``ln(8)`` more at worst.

    A long good history is capital lost, and has to be won back before an alarm: see :class:`Detector`.

    Attributes:
        epsilon: largest mean loss that is in order, between 0 and 1.
        limit: what it has to grow to for an alarm: ``1 / alpha``, at least 1.
        lowest: smallest possible loss: 0, or -1 where an early exit may be better than the last one.
        audits: losses seen.
        alarm_at: number of the audit (from 1) at which it first reached the limit; an alarm is never taken back.
        logs: one number for each bet: the logarithm of its capital.
    """

    epsilon: float
    limit: float
    lowest: float = 0.0
    audits: int = 0
    alarm_at: int | None = None
    logs: list[float] = msgspec.field(default_factory=lambda: [0.0] * BETS)

    def __post_init__(self) -> None:
        require_share("epsilon", self.epsilon)
        if not (self.limit >= 1 and math.isfinite(self.limit)):
            raise CalibrationError(f"limit must be at least 1 (1 / alpha), not {self.limit}")
        if not -1 <= self.lowest <= 0:
            raise CalibrationError(f"lowest must be between -1 and 0, not {self.lowest}")
        if len(self.logs) != BETS or not all(map(math.isfinite, self.logs)):
            raise CalibrationError(f"logs must be {BETS} numbers, not {self.logs}")

    @property
    def alarm(self) -> bool:
        """Whether it ever reached the limit."""
        return self.alarm_at is not None

    @property
    def log_e(self) -> float:
        """Natural logarithm of the evidence now; minus infinity when there is none."""
        return float(_log_mean(self._evidence(np.asarray(self.logs))))

    def add(self, losses: ArrayLike) -> None:
        """Take one loss, or several in their order; in one call or in many, the numbers come out the same.

        Args:
            losses: ``()`` or ``(audits,)``, each between ``lowest`` and 1.

        Raises:
            CalibrationError: a loss is NaN or out of range.
        """
        x = checked_losses(losses, lowest=self.lowest)
        if len(x) == 0:
            return
        bets = _bets(self.epsilon, self.lowest)
        path = self._path(np.asarray(self.logs), np.log1p(np.multiply.outer(x - self.epsilon, bets)))
        if self.alarm_at is None:
            reached = np.flatnonzero(_log_mean(self._evidence(path)) >= math.log(self.limit))
            self.alarm_at = self.audits + int(reached[0]) + 1 if len(reached) else None
        self.audits += len(x)
        self.logs = path[-1].tolist()

    def _path(self, logs: NDArray[np.float64], growth: NDArray[np.float64]) -> NDArray[np.float64]:
        """``(audits, bets)`` logarithms after each audit, added up from left to right."""
        return np.cumsum(np.vstack([logs, growth]), axis=0)[1:]

    def _evidence(self, logs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Logarithm of each bet's evidence, from what is kept of it."""
        return logs


class Detector(Monitor, kw_only=True):
    """The monitor that starts afresh at every audit, and so forgets a good history.

    ``R_t = (R_{t-1} + 1) (1 + nu (x_t - epsilon))``, averaged over the same bets: the e-detector of Shiryaev-Roberts
    form (Shin, Ramdas, Rinaldo: E-detectors, 2022; the e-CUSUM, with ``max(R_{t-1}, 1)`` in place of the
    sum, has the same bound and is never larger).

    Its promise is another one than the monitor's: while the mean loss is in order, the **mean number of audits until a
    false alarm is at least** ``limit``. On an endless stream a false alarm comes some day, with certainty.

    Attributes:
        logs: one number for each bet: ``ln(1 + R)``.
    """

    def _path(self, logs: NDArray[np.float64], growth: NDArray[np.float64]) -> NDArray[np.float64]:
        path = np.empty_like(growth)
        for index, step in enumerate(growth):
            logs = np.logaddexp(0.0, logs + step)
            path[index] = logs
        return path

    def _evidence(self, logs: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore"):  # R = 0 before the first audit
            return logs + np.log(-np.expm1(-logs))


class Mean(msgspec.Struct, kw_only=True):
    """Mean of losses, with bounds that hold at every time at once.

    For losses between 0 and 1 with sum ``k`` among ``n``, ``B(k + 1/2, n - k + 1/2) / B(1/2, 1/2) / (m^k (1-m)^(n-k))``
    is an e-process where ``m`` is the mean: each ``m`` where it stays below ``1 / error`` is in the interval (Robbins
    1970; its mixture with Jeffreys' prior). Between 0 and 1 it holds by the inequality of means,
    ``a^x b^(1-x) <= a x + b (1-x)``. Signed losses are taken apart, ``E[x] = E[max(x, 0)] - E[max(-x, 0)]``, with half
    of the error for each part.

    Attributes:
        audits: losses seen.
        gained: sum of the positive ones.
        regained: sum of the sizes of the negative ones.
    """

    audits: int = 0
    gained: float = 0.0
    regained: float = 0.0

    @property
    def mean(self) -> float | None:
        """``None`` before the first loss."""
        return (self.gained - self.regained) / self.audits if self.audits else None

    def add(self, losses: ArrayLike) -> None:
        """Take one loss, or several: ``()`` or ``(audits,)``, each between -1 and 1.

        Raises:
            CalibrationError: a loss is NaN or out of range.
        """
        x = checked_losses(losses, lowest=-1.0)
        self.audits += len(x)
        for loss in x.tolist():
            self.gained += max(loss, 0.0)
            self.regained += max(-loss, 0.0)

    def bounds(self, *, error: float = 0.05, signed: bool = False) -> tuple[float, float]:
        """Smallest and largest mean that the losses leave possible, at confidence ``1 - error`` at all times at once.

        Args:
            error: chance that the true mean is ever outside.
            signed: whether losses below 0 are possible.
        """
        require_share("error", error)
        if not signed:
            return _bounds(self.gained, self.audits, error)
        low, high = _bounds(self.gained, self.audits, error / 2)
        least, most = _bounds(self.regained, self.audits, error / 2)
        return low - most, high - least


def checked_losses(losses: ArrayLike, *, lowest: float) -> NDArray[np.float64]:
    """``(audits,) float64`` of one loss or several, each between ``lowest`` and 1.

    Raises:
        CalibrationError: one is NaN or out of range.
    """
    x = np.atleast_1d(np.asarray(losses, dtype=np.float64))
    wrong = ~((x >= lowest) & (x <= 1))
    if x.ndim != 1 or wrong.any():
        what = f"loss {x[wrong][0]}" if wrong.any() else f"an array of shape {x.shape}"
        raise CalibrationError(f"{what} given; losses are single numbers between {lowest:g} and 1")
    return x


@cache
def _bets(epsilon: float, lowest: float) -> NDArray[np.float64]:
    """``(bets,)`` values of nu, as shares of the largest that cannot lose more than all.

    For losses of 0 and 1 these are the best ones against rates from ``1.5 epsilon`` to about a half.
    """
    return np.geomspace(epsilon / 2, 0.5, BETS) / (epsilon - lowest)


def _log_mean(logs: NDArray[np.float64]) -> NDArray[Any]:
    """``ln mean exp(logs)`` over the last axis."""
    return np.asarray(np.logaddexp.reduce(logs, axis=-1) - math.log(logs.shape[-1]))


def _bounds(total: float, n: int, error: float) -> tuple[float, float]:
    """Interval of the mean of ``n`` losses between 0 and 1 that add up to ``total``."""
    if n == 0:
        return 0.0, 1.0
    mixture = math.lgamma(total + 0.5) + math.lgamma(n - total + 0.5) - math.lgamma(n + 1) - math.log(math.pi)

    def possible(mean: float) -> bool:
        return mixture - total * math.log(mean) - (n - total) * math.log1p(-mean) < -math.log(error)

    middle = min(max(total / n, STEP), 1 - STEP)
    low = 0.0 if total <= 0 else _edge(middle, 0.0, possible)
    high = 1.0 if total >= n else _edge(middle, 1.0, possible)
    return low, high


def _edge(inside: float, outside: float, possible: Callable[[float], bool]) -> float:
    """Where a bisection from a possible value to an impossible one ends: an impossible one, so never too narrow."""
    while abs(outside - inside) > STEP:
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if possible(middle) else (inside, middle)
    return outside
