"""One temperature per exit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.scores import log_softmax
from edgekit.distributions import bisect

__all__ = ["TEMPERATURE_RANGE", "fit_temperature"]

TEMPERATURE_RANGE = (0.05, 20.0)
"""Where a temperature is looked for. A network that is always right, or guesses, ends at a bound."""


def fit_temperature(logits: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> float:
    """The temperature of least negative log-likelihood, rounded to float32.

    Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, 2017, section 4.2. The likelihood is
    concave in ``1 / T``, so its only optimum is where its derivative changes sign: where the logit that the
    probabilities expect is, on average, that of the label.

    Args:
        logits: ``(samples, classes)``, finite.
        labels: ``(samples,)``.

    Returns:
        A value within :data:`TEMPERATURE_RANGE`.
    """
    wide = logits.astype(np.float64)
    of_labels = wide[np.arange(len(labels)), labels].mean()

    def too_sure(temperature: float) -> bool:
        probabilities = np.exp(log_softmax(wide, temperature=temperature))
        return bool((probabilities * wide).sum(axis=1).mean() > of_labels)

    low, high = TEMPERATURE_RANGE
    return float(np.float32(bisect(too_sure, low=low, high=high)))
