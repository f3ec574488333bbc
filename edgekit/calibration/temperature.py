"""One temperature per exit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.scores import negative_log_likelihood

__all__ = ["TEMPERATURE_RANGE", "fit_temperature"]

TEMPERATURE_RANGE = (0.05, 20.0)
"""Where a temperature is looked for. A network that is always right, or guesses, ends at a bound."""


def fit_temperature(logits: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> float:
    """The temperature of least negative log-likelihood, rounded to float32.

    Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, 2017, section 4.2. The likelihood is
    concave in ``1 / T``, so its only optimum is found by a bounded search over ``log T``.

    Args:
        logits: ``(samples, classes)``, finite.
        labels: ``(samples,)``.

    Returns:
        A value within :data:`TEMPERATURE_RANGE`.
    """
    from scipy.optimize import minimize_scalar

    low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
    found = minimize_scalar(
        lambda log_temperature: negative_log_likelihood(logits, labels, temperature=math.exp(log_temperature)),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return float(np.float32(math.exp(found.x)))
