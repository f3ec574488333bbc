"""A threshold vector, and what it does to samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import CalibrationError

__all__ = ["Candidate", "Losses", "Samples", "evaluate"]

BLOCK = 2**16
"""Samples at a time, so that temporaries stay in the cache."""

Losses = NDArray[np.floating[Any]] | NDArray[np.signedinteger[Any]] | NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A threshold vector, and what it does to the samples it was proposed on.

    Attributes:
        thresholds: one per exit but the last, float32 values; infinity for an exit that nobody takes.
        risk: mean loss.
        deviation: standard deviation of the loss.
        cost: mean, in the unit of the exits' costs.
        shares: of the samples, that leave at each exit.
    """

    thresholds: tuple[float, ...]
    risk: float
    deviation: float
    cost: float
    shares: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What every exit would do to every sample; refuses what no thresholds can be found for.

    Attributes:
        scores: ``(exits - 1, samples) float32``; NaN never leaves.
        losses: ``(exits, samples)`` of leaving at each exit.
        costs: ``(exits,)`` of leaving at each exit, the heads of all exits before it run.
        heads: ``(exits,)`` part of the costs behind an exit that is saved when the exit is off.
    """

    scores: NDArray[np.float32]
    losses: Losses
    costs: NDArray[np.float64]
    heads: NDArray[np.float64]

    @classmethod
    def checked(
        cls,
        scores: NDArray[np.float32],
        losses: Losses,
        costs: Sequence[float],
        heads: Sequence[float] | None = None,
    ) -> Samples:
        """From the arguments of the public functions.

        Raises:
            CalibrationError: shapes that do not fit, or values that are no numbers.
        """
        price = np.asarray(costs, dtype=np.float64)
        saved = np.zeros(price.shape) if heads is None else np.asarray(heads, dtype=np.float64)
        if (
            scores.ndim != 2
            or losses.shape != (len(scores) + 1, scores.shape[1])
            or not price.shape == saved.shape == losses.shape[:1]
        ):
            raise CalibrationError(
                f"scores {scores.shape}, losses {losses.shape}, costs {price.shape} and heads {saved.shape} do not "
                "fit: give (exits - 1, samples), (exits, samples), (exits,) and (exits,)"
            )
        if scores.dtype != np.float32:
            raise CalibrationError(f"scores must be float32, the precision in which they are compared: {scores.dtype}")
        if not (np.isfinite(price).all() and np.isfinite(saved).all()):
            raise CalibrationError("costs and heads must be finite numbers")
        if not all(np.isfinite(row).all() for row in losses):
            raise CalibrationError("a loss is NaN or infinite; give a number for every exit and sample")
        if any((row == np.inf).any() for row in scores):
            raise CalibrationError("a score is infinite, which no threshold holds back; give finite scores, or NaN")
        return cls(scores=scores, losses=losses, costs=price, heads=saved)

    def __len__(self) -> int:
        return int(self.scores.shape[1])

    @property
    def never(self) -> NDArray[np.float32]:
        """Thresholds of the policy with which nobody leaves early."""
        return np.full(len(self.scores), np.inf, dtype=np.float32)

    def rows(self, which: NDArray[np.intp] | slice) -> Samples:
        """Some of the samples."""
        scores, losses = self.scores[:, which], self.losses[:, which]
        return Samples(scores=scores, losses=losses, costs=self.costs, heads=self.heads)

    def drawn(self, most: int, seed: int) -> Samples:
        """At most so many of them, without replacement and in their order."""
        if len(self) <= most:
            return self
        generator = np.random.default_rng(seed)
        return self.rows(np.sort(generator.choice(len(self), most, replace=False, shuffle=False)))

    def evaluate(self, thresholds: NDArray[np.float32]) -> Candidate:
        """Thresholds of exits that nobody takes become infinite, so that their heads need not run."""
        exits = len(self.losses)
        counts, loss, square = np.zeros(exits), 0.0, 0.0
        for start in range(0, len(self), BLOCK):
            part = slice(start, start + BLOCK)
            stays = np.ones(self.losses[0, part].shape, dtype=bool)
            for index in range(exits):
                leaves = stays & (self.scores[index, part] >= thresholds[index]) if index < exits - 1 else stays
                values = self.losses[index, part][leaves].astype(np.float64)
                counts[index] += len(values)
                loss += float(values.sum())
                square += float(values @ values)
                stays = stays & ~leaves
        count = max(len(self), 1)
        shares = counts / count if len(self) else np.append(np.zeros(exits - 1), 1.0)
        used = np.where(counts[:-1] > 0, thresholds, np.float32(np.inf))
        saved = np.append(0.0, np.where(np.isinf(used), self.heads[:-1], 0.0).cumsum())
        return Candidate(
            thresholds=tuple(used.tolist()),
            risk=loss / count,
            deviation=max(square / count - (loss / count) ** 2, 0.0) ** 0.5,
            cost=float(shares @ (self.costs - saved)),
            shares=tuple(shares.tolist()),
        )


def evaluate(
    scores: NDArray[np.float32],
    losses: Losses,
    costs: Sequence[float],
    *,
    thresholds: Sequence[float],
    heads: Sequence[float] | None = None,
) -> Candidate:
    """What a threshold vector does to samples.

    Args:
        scores: ``(exits - 1, samples) float32``; NaN never leaves.
        losses: ``(exits, samples)`` of leaving at each exit.
        costs: of leaving at each exit, the heads of all exits before it run.
        thresholds: one per exit but the last.
        heads: what each exit's head costs, saved behind an exit that nobody takes; nothing if not given.

    Raises:
        CalibrationError: shapes that do not fit, or values that are no numbers.
    """
    chosen = np.asarray(thresholds, dtype=np.float32)
    if chosen.shape != scores.shape[:1]:
        raise CalibrationError(f"{chosen.size} thresholds for {len(scores)} exits before the last: give one each")
    return Samples.checked(scores, losses, costs, heads).evaluate(chosen)
