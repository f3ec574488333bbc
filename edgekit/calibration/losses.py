"""What leaving early costs in answers: one loss per exit and sample, against the network's own last exit.

A loss is at most 1, and 0 for the last exit, so that a policy under which nobody leaves early has no risk at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.risk import Test
from edgekit.calibration.scores import log_softmax
from edgekit.errors import CalibrationError

__all__ = ["LOSSES", "Loss", "accuracy_gap", "brier_gap", "check_losses", "consistency"]

PerSample = Callable[[NDArray[np.float32], NDArray[np.int64] | None], NDArray[Any]]
"""Takes logits ``(exits, samples, classes) float32`` and labels ``(samples,)``, gives losses ``(exits, samples)``."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss and what is known of it. Called with logits and labels, it gives checked losses.

    Attributes:
        name: in certificates and on the command line.
        per_sample: computes it.
        low: smallest value; the largest is 1.
        whole: whether every value is a whole number.
        needs_labels: whether it can be known without them.
    """

    name: str
    per_sample: PerSample
    low: float = 0.0
    whole: bool = False
    needs_labels: bool = True

    @property
    def test(self) -> Test:
        """Of the tests that its range allows, the one with most power."""
        if self.low < 0:
            return "ternary" if self.whole and self.low == -1 else "wsr"
        return "binomial" if self.whole else "hoeffding-bentkus"

    def __call__(self, logits: NDArray[np.float32], labels: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Loss of leaving at each exit, ``(exits, samples) float64``.

        Args:
            logits: ``(exits, samples, classes) float32``.
            labels: ``(samples,)`` class indices; may be left out where the loss needs none.

        Raises:
            CalibrationError: labels are missing or do not fit, or a value is not what the loss says.
        """
        if self.needs_labels and labels is None:
            raise CalibrationError(f"loss '{self.name}' needs labels; without them use 'consistency'")
        losses = check_losses(self.per_sample(logits, labels), logits.shape[:2], name=self.name)
        _require(losses >= self.low, losses, f"loss '{self.name}' is below {self.low}, its smallest value")
        if self.whole:
            _require(losses == np.rint(losses), losses, f"loss '{self.name}' is not a whole number")
        return losses


def check_losses(
    losses: NDArray[Any], shape: tuple[int, int], *, name: str = "custom", zero_at_last: bool = True
) -> NDArray[np.float64]:
    """Losses of the user's own, as float64, when risk can be controlled with them.

    Args:
        losses: ``(exits, samples)``, finite, at most 1, and 0 for the last exit.
        shape: ``(exits, samples)`` that they must have.
        name: for messages.
        zero_at_last: whether the last exit's must be 0, as they are against itself.

    Raises:
        CalibrationError: they are not; the message names the first exit and sample.
    """
    losses = np.asarray(losses)
    if losses.shape != tuple(shape):
        raise CalibrationError(f"loss '{name}' has shape {losses.shape}; give {tuple(shape)}, one per exit and sample")
    if losses.dtype.kind not in "biuf":
        raise CalibrationError(f"loss '{name}' holds {losses.dtype}, not real numbers")
    losses = losses.astype(np.float64, copy=False)
    _require(np.isfinite(losses), losses, f"loss '{name}' is not finite")
    _require(losses <= 1, losses, f"loss '{name}' is above 1: divide it by its largest value")
    if zero_at_last and not (losses[-1] == 0).all():
        sample = int((losses[-1] != 0).argmax())
        raise CalibrationError(
            f"loss '{name}' of the last exit must be 0, sample {sample} has {losses[-1, sample]}: subtract the last "
            "exit's loss from every exit's"
        )
    return losses


def accuracy_gap(predictions: NDArray[np.integer[Any]], labels: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """``1[wrong here] - 1[wrong at the last exit]``: 1 for an answer that leaving here loses, -1 for one that it gains.

    Its mean is the drop of accuracy against the last exit.

    Args:
        predictions: ``(exits, samples)`` class indices.
        labels: ``(samples,)`` class indices.

    Returns:
        ``(exits, samples) float64`` of -1, 0 and 1.

    Raises:
        CalibrationError: the shapes do not fit.
    """
    _require_labels(labels, predictions.shape[1])
    wrong = predictions != labels
    return np.asarray(wrong.astype(np.float64) - wrong[-1], dtype=np.float64)


def consistency(predictions: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """``1[the answer here is not the last exit's]``: needs no labels, and is never below the accuracy gap.

    So whoever bounds its mean by epsilon bounds the drop of accuracy by epsilon as well.

    Args:
        predictions: ``(exits, samples)`` class indices.

    Returns:
        ``(exits, samples) float64`` of 0 and 1.
    """
    return np.asarray(predictions != predictions[-1], dtype=np.float64)


def brier_gap(logits: NDArray[np.float32], labels: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Half the difference of Brier scores, ``(B_here - B_last) / 2``, from -1 to 1.

    ``B = sum_c (p_c - 1[c = label])^2`` lies between 0 and 2 (Brier 1950), so its difference between -2 and 2: halved
    it is at most 1. An epsilon of 0.01 is therefore a Brier score that is worse by 0.02.

    Args:
        logits: ``(exits, samples, classes) float32``, divided by their temperatures if there are any.
        labels: ``(samples,)`` class indices.

    Returns:
        ``(exits, samples) float64``.

    Raises:
        CalibrationError: the shapes do not fit, or a label is no class.
    """
    exits, samples, classes = logits.shape
    _require_labels(labels, samples)
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise CalibrationError(f"label {labels[outside[0]]} of sample {outside[0]} is outside 0 to {classes - 1}")
    scores = np.empty((exits, samples))
    for row, each in zip(scores, logits, strict=True):
        probabilities = np.exp(log_softmax(each.astype(np.float64)))
        right = probabilities[np.arange(samples), labels]
        row[:] = np.square(probabilities).sum(axis=1) - 2 * right + 1
    return np.asarray((scores - scores[-1]) / 2, dtype=np.float64)


def _require_labels(labels: NDArray[np.integer[Any]], samples: int) -> None:
    if labels.shape != (samples,) or labels.dtype.kind not in "iu":
        raise CalibrationError(
            f"labels are {labels.shape} {labels.dtype}; give {samples} class indices, one per sample"
        )


def _require(good: NDArray[np.bool_], losses: NDArray[np.float64], problem: str) -> None:
    if not good.all():
        exit_index, sample = np.unravel_index(int(good.argmin()), good.shape)
        raise CalibrationError(f"{problem}; exit {exit_index} of sample {sample} has {losses[exit_index, sample]}")


def _gap(logits: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.float64]:
    assert labels is not None
    return accuracy_gap(logits.argmax(axis=2), labels)


def _consistency(logits: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.float64]:
    return consistency(logits.argmax(axis=2))


def _brier(logits: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.float64]:
    assert labels is not None
    return brier_gap(logits, labels)


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(name="gap", per_sample=_gap, low=-1.0, whole=True),
        Loss(name="consistency", per_sample=_consistency, whole=True, needs_labels=False),
        Loss(name="brier", per_sample=_brier, low=-1.0),
    )
}
"""The built-in losses by name."""
