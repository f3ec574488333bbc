"""Fits a learned score, and says how well a score tells right answers from wrong ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import CalibrationError
from edgekit.scoring import LearnedScorer, exit_features, log_odds

__all__ = ["auroc", "fit_scorer"]

RIDGE = 1e-2
"""Penalty on the weights, per sample: half of this times their squared length, intercept left out."""
NEWTON_STEPS = 50
"""At most; a handful suffices."""
SETTLED = 1e-10
"""Largest gradient at which the fit ends."""

Floats = NDArray[np.float64]


def auroc(score: NDArray[np.floating[Any]], right: NDArray[np.bool_]) -> float:
    """Probability that a right answer's score is above a wrong one's, ties counting half.

    The Mann-Whitney statistic over the number of pairs (Hanley and McNeil, 1982). It does not depend on calibration:
    only the order of the scores matters, as it does for thresholds.

    Args:
        score: ``(samples,)``; NaN counts as below every number, since it never leaves.
        right: ``(samples,)``.

    Returns:
        0 to 1; NaN where all answers are right, or all wrong.
    """
    ordered = np.where(np.isnan(score), -np.inf, score)
    _, place, counts = np.unique(ordered, return_inverse=True, return_counts=True)
    rights = np.bincount(place, weights=right, minlength=len(counts))
    wrongs = counts - rights
    pairs = rights.sum() * wrongs.sum()
    if pairs == 0:
        return float("nan")
    below = wrongs.cumsum() - wrongs
    return float((rights * (below + wrongs / 2)).sum() / pairs)


def fit_scorer(logits: NDArray[np.float32], labels: NDArray[np.int64] | None = None) -> LearnedScorer:
    """One scorer for every exit but the last. Deterministic.

    Args:
        logits: ``(exits, samples, classes) float32``; samples with logits that are not finite are left out.
        labels: ``(samples,)``; ``None`` learns whether an exit agrees with the last exit.

    Raises:
        CalibrationError: there is nothing to learn from.
    """
    usable = np.isfinite(logits).all(axis=(0, 2))
    if not usable.any():
        raise CalibrationError("a learned score needs samples with finite logits, and there are none")
    logits = logits[:, usable]
    target = logits[-1].argmax(axis=1) if labels is None else labels[usable]
    earlier: list[Floats] = []
    fitted: list[tuple[Floats, Floats, Floats]] = []
    for each in logits[:-1]:
        features = exit_features(each, earlier)
        centre, scale = features.mean(axis=0), features.std(axis=0)
        scale = np.where(scale > 1e-12, scale, 1.0)
        found = _logistic((features - centre) / scale, each.argmax(axis=1) == target)
        earlier.append(log_odds(features, centre, scale, found))
        fitted.append((centre, scale, found))
    centres, scales, weights = (tuple(tuple(each[part].tolist()) for each in fitted) for part in range(3))
    return LearnedScorer(classes=logits.shape[2], centres=centres, scales=scales, weights=weights)


def _logistic(features: Floats, right: NDArray[np.bool_]) -> Floats:
    """Weights and intercept of least penalised mean log loss, by Newton's method with halved steps.

    The intercept carries a small penalty too, by one pseudo-sample of each kind at the centre, so that targets of a
    single kind have a finite answer.
    """
    samples, width = features.shape
    design = np.column_stack([np.concatenate([features, np.zeros((2, width))]), np.ones(samples + 2)])
    sign = np.where(np.append(right, [True, False]), 1.0, -1.0)
    ridge = np.append(np.full(width, RIDGE * samples), 0.0)
    weights = np.zeros(width + 1)

    def loss(at: Floats) -> float:
        return float(np.logaddexp(0, -sign * (design @ at)).sum() + (ridge * at**2).sum() / 2)

    current = loss(weights)
    for _ in range(NEWTON_STEPS):
        chance = 1 / (1 + np.exp(np.clip(sign * (design @ weights), -500, 500)))  # of the other kind
        gradient = ridge * weights - design.T @ (sign * chance)
        if np.abs(gradient).max() <= SETTLED * samples:
            break
        hessian = (design.T * (chance * (1 - chance))) @ design + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while (found := loss(weights - size * step)) > current and size > 1e-6:
            size /= 2
        if found > current:
            break
        weights, current = weights - size * step, found
    return weights
