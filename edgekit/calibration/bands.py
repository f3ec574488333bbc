"""Intervals around a mean loss, and the smallest epsilon that a test passes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.losses import Loss
from edgekit.calibration.risk import Test, clopper_pearson_lower, clopper_pearson_upper, p_value

__all__ = ["interval", "smallest_epsilon"]

STEPS = 30
"""Halvings of the interval in which an epsilon is looked for."""


def interval(losses: NDArray[np.float64], loss: Loss, confidence: float) -> tuple[float, float]:
    """A two-sided confidence interval of the mean, for one policy alone.

    Of whole losses by Clopper and Pearson (1934), for the shares of 1 and of -1 at half the error each; of others by
    the empirical Bernstein bound (Maurer and Pontil 2009, theorem 4).

    Args:
        losses: ``(samples,)`` of one policy.
        loss: what they are.
        confidence: of the interval, 0 to 1.
    """
    error, n = 1 - confidence, len(losses)
    if n == 0:
        return loss.low, 1.0
    if loss.whole and loss.low >= -1:
        lost, gained = int((losses == 1).sum()), int((losses == -1).sum())
        side = error / (4 if loss.low < 0 else 2)
        low, high = clopper_pearson_lower(lost, n, side), clopper_pearson_upper(lost, n, side)
        if loss.low < 0:
            low -= clopper_pearson_upper(gained, n, side)
            high -= clopper_pearson_lower(gained, n, side)
        return low, high
    if n == 1:
        return loss.low, 1.0
    mean, logs = float(losses.mean()), math.log(4 / error)
    slack = math.sqrt(2 * float(losses.var(ddof=1)) * logs / n) + 7 * (1 - loss.low) * logs / (3 * (n - 1))
    return max(loss.low, mean - slack), min(1.0, mean + slack)


def smallest_epsilon(losses: NDArray[np.float64], *, test: Test, delta: float) -> float:
    """The least epsilon for which the test accepts: an upper bound of the mean loss, broken with probability ``delta``.

    Args:
        losses: ``(samples,)``, in the order in which they are tested.
        test: of the mean loss.
        delta: 0 to 1.

    Returns:
        To within ``2**-STEPS``; 1 where no epsilon passes.
    """
    test = "wsr" if test == "ternary" else test  # one test for every epsilon that is tried
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if p_value(losses, test=test, epsilon=middle, delta=delta) <= delta:
            high = middle
        else:
            low = middle
    return high
