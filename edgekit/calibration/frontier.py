"""The trade-off of mean loss against mean cost, with a threshold of its own for every exit.

A *pool* of threshold vectors is kept down to its Pareto front. It starts with nobody leaving and with shared ranks;
where exits or cuts are few, every combination of a quantile grid is counted exactly. Then, for a sweep of Lagrange
multipliers, the pool's best vector of ``cost + multiplier * loss`` is improved one exit at a time, from the last to the
first. Such a step sums over the samples that reach the exit, by their score there, which gives loss and cost of *every*
threshold of that exit, the others held; all of them join the pool.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.candidates import Samples
from edgekit.calibration.thresholds import CELLS, cuts, tally

__all__ = ["Pool", "pareto", "quantile_cuts", "search"]

EXACT = 3
"""Exits before the last up to which every combination of cuts is counted, of as many cuts as fit."""
CUTS = 256
"""Thresholds of one exit that are compared."""
SHARED = 32
"""Vectors of shared ranks that the search starts with."""
MULTIPLIERS = np.geomspace(1e4, 1e-2, 25)
"""Worth of one unit of loss, in units of the dearest exit; strict first."""
SWEEPS = 8
"""Times that all exits are improved in turn, at most, for one multiplier."""

Floats = NDArray[np.float64]
Positions = NDArray[np.int16]
Vectors = tuple[Floats, Floats, Positions]
"""Mean losses, mean costs, and the cut of each exit: ``(vectors,)`` twice and ``(vectors, exits - 1)``."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Threshold vectors of which none is beaten by another in both.

    Attributes:
        grids: ascending thresholds of each exit, infinity last.
        loss: ``(vectors,)`` means, ascending.
        cost: ``(vectors,)`` means, descending.
        positions: ``(vectors, exits - 1)`` indices into the grids.
    """

    grids: tuple[NDArray[np.float32], ...]
    loss: Floats
    cost: Floats
    positions: Positions

    def joined(self, more: Vectors) -> Pool:
        """With what is not beaten of more vectors; of equals, those that were here."""
        loss, cost = np.concatenate([self.loss, more[0]]), np.concatenate([self.cost, more[1]])
        positions = np.concatenate([self.positions, more[2]])
        kept = pareto(loss, cost)
        return Pool(grids=self.grids, loss=loss[kept], cost=cost[kept], positions=positions[kept])

    @property
    def thresholds(self) -> NDArray[np.float32]:
        """``(vectors, exits - 1)``."""
        found = np.empty(self.positions.shape, dtype=np.float32)
        for index, grid in enumerate(self.grids):
            found[:, index] = grid[self.positions[:, index]]
        return found


def pareto(loss: Floats, cost: Floats) -> NDArray[np.intp]:
    """Indices of what nothing beats in both, by ascending loss; of equals, the first."""
    order = np.lexsort((cost, loss))
    ordered = cost[order]
    before = np.minimum.accumulate(np.append(np.inf, ordered))[:-1]
    return np.asarray(order[ordered < before], dtype=np.intp)


def quantile_cuts(scores: NDArray[np.float32], ranks: Floats) -> NDArray[np.float32]:
    """The cuts just below quantiles of some scores, ascending.

    Args:
        scores: ``(samples,) float32``, at least one that is not NaN.
        ranks: of the quantiles, ascending, 0 to 1.

    Returns:
        ``(ranks,) float32``; equal ones where scores are tied.
    """
    grid, ordered = cuts(scores), np.sort(scores[~np.isnan(scores)])
    wanted = ordered[(ranks * (len(ordered) - 1)).round().astype(np.intp)]
    return np.asarray(grid[np.searchsorted(grid, wanted, side="right") - 1])


def search(samples: Samples) -> Pool:
    """The pool of at least one sample; with a single exit, or none to take, it holds never-exit alone."""
    reduced = _Reduced(samples)
    never = np.asarray([[len(grid) - 1 for grid in reduced.grids]], dtype=np.int16)
    loss, cost = np.asarray([reduced.losses[-1].mean()]), np.asarray([samples.evaluate(samples.never).cost])
    pool = Pool(grids=reduced.grids, loss=loss, cost=cost, positions=never)
    if never.sum() == 0:
        return pool
    pool = pool.joined(reduced.shared())
    if len(reduced.grids) <= EXACT or math.prod(map(len, reduced.grids)) <= CELLS:
        pool = pool.joined(reduced.combinations())
    scale = float(np.abs(samples.costs).max())
    for multiplier in scale * np.concatenate([MULTIPLIERS, MULTIPLIERS[::-1]]):
        positions = pool.positions[(pool.cost + multiplier * pool.loss).argmin()].copy()
        for _ in range(SWEEPS):
            before = positions.copy()
            for vectors in reduced.improved(positions, float(multiplier)):
                pool = pool.joined(vectors)
            if (positions == before).all():
                break
    return pool


class _Reduced:
    """Samples reduced to how many of its exit's cuts each score reaches (of NaN none), and sums over them."""

    def __init__(self, samples: Samples) -> None:
        self.samples, self.costs, self.heads = samples, samples.costs, samples.heads
        self.losses = samples.losses.astype(np.float64)
        self.grids = tuple(_grid(row) for row in samples.scores)
        self.reached = np.zeros(samples.scores.shape, dtype=np.int16)
        for reached, grid, row in zip(self.reached, self.grids, samples.scores, strict=True):
            reached[:] = np.where(np.isnan(row), 0, np.searchsorted(grid, row, side="right"))

    def combinations(self) -> Vectors:
        """Every combination of at most :data:`edgekit.calibration.thresholds.CELLS` cuts."""
        most = int(CELLS ** (1 / len(self.grids)))
        choices = [np.unique(np.linspace(0, len(grid) - 1, most).astype(np.int16)) for grid in self.grids]
        free: list[NDArray[np.intp]] = []
        loss, cost, here = np.zeros(()), np.zeros(()), np.asarray(float(self.losses.shape[1]))
        for index, chosen in enumerate(choices):
            reached = np.searchsorted(chosen, self.reached[index])  # who reached n cuts reaches those below n
            leaves = reached > 0
            axes, sizes = [bins[leaves] for bins in (*free, reached)], [*loss.shape, len(chosen)]
            count = tally(axes, sizes, None)
            loss = loss[..., None] + tally(axes, sizes, (self.losses[index] - self.losses[-1])[leaves])
            cost = cost[..., None] + (self.costs[index] - self.costs[-1]) * count
            cost[..., -1] -= self.heads[index] * here
            here = here[..., None] - count
            free.append(reached)
        places = np.unravel_index(np.arange(loss.size), loss.shape)
        positions = np.stack([chosen[place] for chosen, place in zip(choices, places, strict=True)], axis=1)
        samples = self.losses.shape[1]
        return self.losses[-1].mean() + loss.ravel() / samples, self.costs[-1] + cost.ravel() / samples, positions

    def shared(self) -> Vectors:
        """The same rank among an exit's cuts at every exit."""
        ranks = np.linspace(0, 1, SHARED)[:, None]
        positions = (ranks * [len(grid) - 1 for grid in self.grids]).astype(np.int16)
        found = [
            self.samples.evaluate(np.asarray([grid[cut] for grid, cut in zip(self.grids, row, strict=True)]))
            for row in positions
        ]
        return np.asarray([each.risk for each in found]), np.asarray([each.cost for each in found]), positions

    def improved(self, positions: Positions, multiplier: float) -> Iterator[Vectors]:
        """Improve ``positions`` in place, the last exit first; gives all vectors that were compared on the way."""
        costs, heads, samples = self.costs, self.heads, self.losses.shape[1]
        passes = self.reached > positions[:, None]
        taken = np.where(passes.any(axis=0), passes.argmax(axis=0), len(positions))
        off = np.asarray([cut == len(grid) - 1 for cut, grid in zip(positions, self.grids, strict=True)])
        saved = np.append(0.0, (heads[:-1] * off).cumsum())  # by heads before each exit
        lost = np.bincount(taken, weights=self.losses[taken, np.arange(samples)], minlength=len(costs))
        spent = np.bincount(taken, minlength=len(costs)) * (costs - saved)
        later_loss, later_cost = self.losses[-1], np.full(samples, costs[-1])
        for index in range(len(positions) - 1, -1, -1):
            here = np.flatnonzero(taken >= index)
            bins, size = self.reached[index][here], len(self.grids[index])
            more_loss = np.bincount(bins, weights=(self.losses[index] - later_loss)[here], minlength=size + 1)
            more_cost = np.bincount(bins, weights=(costs[index] - later_cost)[here], minlength=size + 1)
            loss = lost[:index].sum() + later_loss[here].sum() + more_loss[:0:-1].cumsum()[::-1]
            cost = spent[:index].sum() + later_cost[here].sum() + more_cost[:0:-1].cumsum()[::-1]
            cost -= saved[index] * len(here)
            cost[-1] -= heads[index] * len(here)
            vectors = np.repeat(positions[None], size, axis=0)
            vectors[:, index] = np.arange(size)
            yield loss / samples, cost / samples, vectors
            objective = cost + multiplier * loss
            best = size - 1 - int(objective[::-1].argmin())  # of equals the strictest
            positions[index] = best
            leaves = self.reached[index] > best
            later_loss = np.where(leaves, self.losses[index], later_loss)
            later_cost = np.where(leaves, costs[index], later_cost - heads[index] * (best == size - 1))


def _grid(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """All cuts of one exit, or :data:`CUTS` of them."""
    grid = cuts(scores)
    if len(grid) <= CUTS:
        return grid
    return np.append(np.unique(quantile_cuts(scores, np.linspace(0, 1, CUTS - 1))), np.float32(np.inf))
