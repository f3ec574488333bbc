"""Confidence of logits, as a stage computes it, and how far confidence is from accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import CalibrationError
from edgekit.plan import SCORES
from edgekit.scoring import log_softmax

__all__ = ["expected_calibration_error", "log_softmax", "negative_log_likelihood", "require_score", "score"]


def require_score(name: str) -> None:
    """Raises :class:`CalibrationError` unless ``name`` is one of :data:`edgekit.plan.SCORES`."""
    if name not in SCORES:
        raise CalibrationError(f"score {name!r} is not one of {', '.join(SCORES)}")


def score(logits: NDArray[np.float32], *, name: str, temperature: float = 1.0) -> NDArray[np.float32]:
    """Confidence of each row, one of :data:`edgekit.plan.SCORES`, in float32 as a stage computes it.

    Args:
        logits: ``(..., classes) float32``.
        name: of the score.
        temperature: positive; divides the logits.

    Returns:
        ``(...) float32``; NaN where any logit of the row is NaN or infinite.

    Raises:
        CalibrationError: the score is unknown.
    """
    require_score(name)
    logs = log_softmax(np.asarray(logits, dtype=np.float32), temperature=temperature)
    probabilities = np.exp(logs)
    if name == "neg_entropy":
        return np.asarray((probabilities * logs).sum(axis=-1), dtype=np.float32)
    if name == "max_prob":
        return np.asarray(probabilities.max(axis=-1), dtype=np.float32)
    if probabilities.shape[-1] == 1:
        return np.asarray(probabilities[..., 0], dtype=np.float32)
    top = np.partition(probabilities, -2, axis=-1)
    return np.asarray(top[..., -1] - top[..., -2], dtype=np.float32)


def negative_log_likelihood(
    logits: NDArray[np.floating[Any]], labels: NDArray[np.int64], *, temperature: float = 1.0
) -> float:
    """Mean of ``-log softmax(logits / temperature)[label]``, in nats, summed in float64.

    Args:
        logits: ``(samples, classes)``.
        labels: ``(samples,)``.
        temperature: positive.
    """
    logs = log_softmax(logits.astype(np.float64), temperature=temperature)
    return float(-logs[np.arange(len(labels)), labels].mean())


def expected_calibration_error(
    logits: NDArray[np.floating[Any]], labels: NDArray[np.int64], *, temperature: float = 1.0, bins: int = 15
) -> float:
    """ECE: ``sum_b |B_b| / n * |accuracy(B_b) - confidence(B_b)|`` over equal-width bins of max probability.

    Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, 2017, equation 5. Bins are
    ``((b - 1) / bins, b / bins]``.

    Args:
        logits: ``(samples, classes)``.
        labels: ``(samples,)``.
        temperature: positive.
        bins: how many.
    """
    probabilities = np.exp(log_softmax(logits.astype(np.float64), temperature=temperature))
    confidence = probabilities.max(axis=1)
    excess = (probabilities.argmax(axis=1) == labels) - confidence
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(place, weights=excess, minlength=bins)).sum() / len(labels))
