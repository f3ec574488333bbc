"""Scores that need more than one exit's logits, so that no stage computes them: patience, and a learned one.

A row's score follows from its own logits to the last bit, whatever else is in the batch. So a session, which scores
exit by exit the rows that are still in, finds what a calibration finds that scores all exits at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.errors import CalibrationError, PolicyError

__all__ = [
    "HOST_SCORES",
    "LearnedRows",
    "LearnedScorer",
    "PatienceRows",
    "RowScores",
    "exit_features",
    "log_odds",
    "log_softmax",
    "patience",
]

HOST_SCORES = ("patience", "learned")
"""Scores that are computed from the logits of an exit and of those before it; each grows with confidence."""

ODDS_LIMIT = 30.0
"""Log-odds beyond these are as good as certain; clipped so that no weight overflows."""
MOST_PROBABILITIES = 16
"""Largest probabilities that are features; the rest of many classes say little."""
BLOCK = 2**13
"""Samples at a time, so that temporaries stay in the cache."""

Floats = NDArray[np.float64]


def log_softmax(logits: NDArray[np.floating[Any]], *, temperature: float = 1.0) -> NDArray[Any]:
    """``log softmax(logits / temperature)`` over the last axis, in the precision of ``logits``.

    Args:
        logits: ``(..., classes)``, finite; a row that is not becomes NaN.
        temperature: positive.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not finite, and so NaN
        scaled = logits / logits.dtype.type(temperature)
        finite = np.isfinite(scaled).all(axis=-1, keepdims=True)
        shifted = scaled - scaled.max(axis=-1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.where(finite, logs, logits.dtype.type(np.nan))


def patience(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """How many exits in a row, up to each one, have given the same class as it.

    Zhou et al.: BERT Loses Patience, 2020: an input leaves when its answer has stayed the same for a number of exits,
    which is the threshold of this score.

    Args:
        logits: ``(exits, samples, classes) float32``.

    Returns:
        ``(exits, samples) float32``: 0 at the first exit, one more for every exit that agrees with the one before it,
        0 again where it does not. NaN where the exit's logits are not finite; such an exit agrees with none.
    """
    scores = PatienceRows(logits.shape[1])
    every = np.arange(logits.shape[1])
    return np.stack([scores.at(index, each, every) for index, each in enumerate(logits)])


class LearnedScorer(msgspec.Struct, frozen=True, kw_only=True):
    """Per exit, a logistic regression of whether its answer is right, on what is known when the exit is reached.

    After EENet (Ilhan et al., 2024), which trains a linear scorer on the same features for a budget; here each exit is
    fitted on its own, by maximum likelihood (:func:`edgekit.calibration.scorers.fit_scorer`). See
    :func:`exit_features` for the features.

    Attributes:
        classes: of the logits.
        centres: mean of each feature, per exit but the last.
        scales: standard deviation of each feature, likewise; 1 where it does not vary.
        weights: of the standardised features, likewise, the intercept last.
    """

    classes: int
    centres: tuple[tuple[float, ...], ...]
    scales: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        widths = [min(self.classes, MOST_PROBABILITIES) + 2 + index for index in range(len(self.weights))]
        if not (
            self.classes > 0
            and [len(each) for each in self.centres] == [len(each) for each in self.scales] == widths
            and [len(each) - 1 for each in self.weights] == widths
            and all(map(math.isfinite, chain(*self.centres, *self.scales, *self.weights)))
            and all(value > 0 for value in chain(*self.scales))
        ):
            raise PolicyError("a learned scorer has the wrong number of weights, or some that are no numbers: fit anew")

    @property
    def exits(self) -> int:
        """Of the network, the last included, which nothing is learned for."""
        return len(self.weights) + 1

    def __call__(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Log-odds that each exit's answer is right.

        Args:
            logits: ``(exits, samples, classes) float32``; of the exits that were fitted the first ones suffice.

        Returns:
            ``(exits, samples) float32``, at most as many exits as were fitted. NaN where the logits of the exit or of
            an earlier one are not finite.

        Raises:
            CalibrationError: the classes are not those that were fitted.
        """
        if logits.shape[2] != self.classes:
            raise CalibrationError(f"learned for {self.classes} classes, but these logits have {logits.shape[2]}")
        logits = logits[: len(self.weights)]
        found = np.empty(logits.shape[:2], dtype=np.float32)
        for start in range(0, logits.shape[1], BLOCK):
            part = logits[:, start : start + BLOCK]
            scores = LearnedRows(self, part.shape[1])
            every = np.arange(part.shape[1])
            for index, each in enumerate(part):
                found[index, start : start + BLOCK] = scores.at(index, each, every)
        return found


def exit_features(logits: NDArray[np.float32], earlier: Sequence[Floats] | Floats) -> Floats:
    """What a learned scorer looks at.

    The exit's probabilities from the largest down (at most :data:`MOST_PROBABILITIES`), negative entropy, margin, and
    the log-odds that the earlier exits' scorers gave.

    Args:
        logits: ``(samples, classes) float32``.
        earlier: ``(earlier exits, samples)`` log-odds.

    Returns:
        ``(samples, features) float64``, C-contiguous; NaN in rows that are not finite.
    """
    logs = log_softmax(logits.astype(np.float64, order="C"))
    probabilities = np.exp(logs)
    descending = -np.sort(-probabilities, axis=1)
    most = min(logits.shape[1], MOST_PROBABILITIES)
    features = np.empty((len(logits), most + 2 + len(earlier)))
    features[:, :most] = descending[:, :most]
    features[:, most] = (probabilities * logs).sum(axis=1)
    features[:, most + 1] = descending[:, 0] - (descending[:, 1] if most > 1 else 0.0)
    for place, odds in enumerate(earlier, start=most + 2):
        features[:, place] = odds
    return features


def log_odds(features: Floats, centre: Floats, scale: Floats, weights: Floats) -> Floats:
    """Clipped to :data:`ODDS_LIMIT`. Summed row by row: a matrix product may sum in another order for another batch.

    Args:
        features: ``(samples, features)``, C-contiguous.
        centre: ``(features,)``.
        scale: ``(features,)``.
        weights: ``(features + 1,)``, the intercept last.
    """
    odds = (weights[:-1] * ((features - centre) / scale)).sum(axis=1) + weights[-1]
    return np.asarray(np.clip(odds, -ODDS_LIMIT, ODDS_LIMIT))


class PatienceRows:
    """:func:`patience` of the rows of a run, exit by exit.

    Args:
        rows: of the run.
    """

    def __init__(self, rows: int) -> None:
        self._classes = np.full(rows, -1)
        self._runs = np.zeros(rows, dtype=np.float32)

    def at(self, exit: int, logits: NDArray[np.float32], rows: NDArray[np.intp]) -> NDArray[np.float32]:  # noqa: A002
        """Scores ``(rows,) float32`` at an exit. The first exit, 0, begins anew; from there none is left out.

        Args:
            exit: its index.
            logits: ``(rows, classes) float32``.
            rows: which ones of the run they are.
        """
        known = np.asarray(np.isfinite(logits).all(axis=1))
        classes = logits.argmax(axis=1)
        same = known & (classes == self._classes[rows]) & (exit > 0)
        runs = np.where(same, self._runs[rows] + np.float32(1), np.float32(0))
        self._classes[rows] = np.where(known, classes, -1)
        self._runs[rows] = runs
        return np.where(known, runs, np.float32(np.nan))


class LearnedRows:
    """Scores of a :class:`LearnedScorer` for the rows of a run, exit by exit.

    Args:
        scorer: of the network.
        rows: of the run.
    """

    def __init__(self, scorer: LearnedScorer, rows: int) -> None:
        fitted = zip(scorer.centres, scorer.scales, scorer.weights, strict=True)
        self._fitted = [(np.asarray(centre), np.asarray(scale), np.asarray(found)) for centre, scale, found in fitted]
        self._odds = np.empty((len(self._fitted), rows))

    def at(self, exit: int, logits: NDArray[np.float32], rows: NDArray[np.intp]) -> NDArray[np.float32]:  # noqa: A002
        """Scores as of :meth:`PatienceRows.at`; NaN at the last exit, which nothing was learned for."""
        if exit == len(self._fitted):
            return np.full(len(rows), np.nan, dtype=np.float32)
        odds = log_odds(exit_features(logits, self._odds[:exit, rows]), *self._fitted[exit])
        self._odds[exit, rows] = odds
        return odds.astype(np.float32)


RowScores = PatienceRows | LearnedRows
