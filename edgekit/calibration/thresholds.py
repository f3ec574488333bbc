"""Thresholds of least cost whose accuracy stays near the last exit's, found on the samples at hand.

What every sample does is decided by its score at each exit, so only the gaps between neighbouring scores matter: a
threshold is a *cut*, a gap of one exit's scores. A joint grid of cuts is solved exactly: samples are counted once by
the cuts they pass, and cumulative sums give count and accuracy of every combination at once. Where all cuts of all
exits make too large a grid, a coarse grid is solved first and narrowed around its best, from several starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CELLS", "Choice", "choose_thresholds", "cuts", "exits_taken", "tally"]

CELLS = 2**19
"""Threshold combinations in one exactly solved grid; a table of them takes 4 MiB."""
JOINT = 4
"""Exits whose thresholds are narrowed together; more are taken in overlapping groups."""
SEPARATION = 1e-6
"""Scores nearer than this count as tied: another batch size or runtime may round them past each other."""

Positions = tuple[int, ...]
"""One cut per exit but the last, as an index into that exit's cuts."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Thresholds, and what they do to the samples that they were chosen on.

    Attributes:
        thresholds: one per exit but the last; float32 values, infinity for an exit that does not pay.
        exits: ``(samples,)`` exit that each sample takes.
        correct: samples that the exits they take classify rightly.
        cost: mean of the samples.
        combinations: of thresholds, that were compared.
        exact: whether every combination of cuts was, so that nothing better exists.
    """

    thresholds: tuple[float, ...]
    exits: NDArray[np.intp]
    correct: int
    cost: float
    combinations: int
    exact: bool


def exits_taken(scores: NDArray[np.float32], thresholds: Sequence[float]) -> NDArray[np.intp]:
    """The first exit whose score reaches its threshold; else the last. NaN never exits.

    Args:
        scores: ``(exits - 1, samples) float32``.
        thresholds: one per row.

    Returns:
        ``(samples,)`` exit indices.
    """
    passes = scores >= np.asarray(thresholds, dtype=np.float32)[:, None]
    every = np.concatenate([passes, np.ones((1, scores.shape[1]), dtype=bool)])
    return np.asarray(every.argmax(axis=0), dtype=np.intp)


def cuts(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every threshold that matters for one exit, ascending: the smallest score, each gap's middle, infinity.

    Args:
        scores: ``(samples,) float32``; NaN is ignored. Neighbours within :data:`SEPARATION` are not told apart.

    Returns:
        ``(cuts,) float32``; a score reaches a cut exactly when it lies above the gap, after rounding too.
    """
    distinct = np.unique(scores[~np.isnan(scores)])
    if len(distinct) == 0:
        return np.asarray([np.inf], dtype=np.float32)
    below, above = distinct[:-1], distinct[1:]
    wide = above.astype(np.float64) - below > SEPARATION
    below, above = below[wide], above[wide]
    middle = ((below.astype(np.float64) + above) / 2).astype(np.float32)
    middle = np.where(middle > below, middle, above)  # rounding must not let the lower score through
    return np.concatenate([distinct[:1], middle, np.asarray([np.inf], dtype=np.float32)])


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Samples reduced to what the search needs.

    Attributes:
        passed: ``(exits - 1, samples)`` how many of the exit's cuts the sample's score reaches.
        gains: ``(exits - 1, samples)`` 1 where the exit is right and the last one wrong, -1 the other way round.
        savings: ``(exits - 1,)`` cost saved by a sample that leaves there instead of at the last exit.
        sizes: number of cuts of each exit.
        allowed: how many more samples than the last exit the policy may get wrong.
    """

    passed: NDArray[np.intp]
    gains: NDArray[np.float64]
    savings: NDArray[np.float64]
    sizes: tuple[int, ...]
    allowed: int

    @property
    def never(self) -> Positions:
        """Nobody leaves early."""
        return tuple(size - 1 for size in self.sizes)


@dataclass(frozen=True, order=True)
class _Found:
    """A feasible combination; the greater the better: saves more, then is right more often, then is stricter."""

    saving: float
    gain: float
    positions: Positions


def choose_thresholds(
    scores: NDArray[np.float32], right: NDArray[np.bool_], *, costs: Sequence[float], allowed: int
) -> Choice:
    """Thresholds of least mean cost that lose at most ``allowed`` correct answers to the last exit.

    Up to :data:`CELLS` combinations of cuts are compared exhaustively. Beyond that, joint grids (of :data:`JOINT`
    exits at a time) are narrowed from three starts: nobody leaves early, the best shared threshold, and the best of
    coordinate descent with a sweep of Lagrange multipliers. The result is never worse than any of the three.

    Args:
        scores: ``(exits - 1, samples) float32``.
        right: ``(exits, samples)`` whether each exit classifies each sample rightly.
        costs: of a sample that leaves at each exit; any unit, not necessarily rising.
        allowed: at least 0.
    """
    price = np.asarray(costs, dtype=np.float64)
    grids = [cuts(row) for row in scores]
    problem = _Problem(
        passed=_passed(scores, grids),
        gains=right[:-1].astype(np.float64) - right[-1],
        savings=price[-1] - price[:-1],
        sizes=tuple(len(grid) for grid in grids),
        allowed=allowed,
    )
    search = _Search(problem)
    exact = math.prod(problem.sizes) <= CELLS
    if exact:
        best = search.grid([np.arange(size) for size in problem.sizes])
    else:
        starts = {problem.never, _shared(problem, scores, grids), search.multiplied().positions}
        best = max(search.narrowed(start) for start in starts)
    chosen = np.asarray([grid[cut] for grid, cut in zip(grids, best.positions, strict=True)], dtype=np.float32)
    exits = exits_taken(scores, chosen.tolist())
    unused = np.setdiff1d(np.arange(len(chosen)), exits)
    chosen[unused] = np.inf
    return Choice(
        thresholds=tuple(chosen.tolist()),
        exits=exits,
        correct=int(right[exits, np.arange(len(exits))].sum()),
        cost=float(price[exits].mean()),
        combinations=search.combinations,
        exact=exact,
    )


class _Search:
    """Solves grids of cuts, and counts the combinations compared."""

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem
        self.combinations = 0

    def grid(self, grids: Sequence[NDArray[np.intp]], *, multiplier: float | None = None) -> _Found:
        """The best combination of one cut from each grid, exactly.

        Args:
            grids: ascending cuts of each exit; a single one holds that exit fixed.
            multiplier: worth of a right answer; ``None`` demands at most ``allowed`` lost ones instead.
        """
        problem = self.problem
        alive = np.ones(problem.passed.shape[1], dtype=bool)
        free: list[NDArray[np.intp]] = []
        saving, gain = np.zeros(()), np.zeros(())
        for grid, passed, gains, worth in zip(grids, problem.passed, problem.gains, problem.savings, strict=True):
            reached = np.searchsorted(grid, passed)  # a sample that reached n cuts reaches those below n
            leaves = alive & (reached > 0)
            axes = [bins[leaves] for bins in (*free, reached)]
            sizes = [*saving.shape, len(grid)]
            count = tally(axes, sizes, None)
            right = tally(axes, sizes, gains[leaves])
            if len(grid) > 1:
                free.append(reached)
                saving, gain = saving[..., None] + worth * count, gain[..., None] + right
            else:
                alive &= ~leaves
                saving, gain = saving + worth * count[..., 0], gain + right[..., 0]
        self.combinations += saving.size
        if multiplier is None:
            objective = np.where(gain >= -problem.allowed, saving, -np.inf)
        else:
            objective = saving + multiplier * gain
        best = np.flatnonzero(objective == objective.max())
        best = best[gain.flat[best] == gain.flat[best].max()]
        place = iter(np.unravel_index(best[-1], saving.shape))
        positions = tuple(int(grid[next(place)] if len(grid) > 1 else grid[0]) for grid in grids)
        return _Found(float(objective.flat[best[-1]]), float(gain.flat[best[-1]]), positions)

    def narrowed(self, start: Positions) -> _Found:
        """The best around ``start``: grids that span every cut, then ever fewer of them, until nothing improves."""
        best = self.grid(_fixed(start))
        groups = tuple(_groups(len(start)))
        points = int(CELLS ** (1 / len(groups[0])))
        width = max(self.problem.sizes)
        while True:
            before = best
            for group in groups:
                best = max(best, self.grid(self._around(best.positions, group, width=width, points=points)))
            if width <= points and best == before:
                return best
            width = max(width // 4, points)

    def multiplied(self) -> _Found:
        """The best feasible end of coordinate descent on ``saving + mu * gain``, over a sweep of multipliers ``mu``."""
        current = self.problem.never
        best = self.grid(_fixed(current))
        for multiplier in np.geomspace(1000, 0.01, 16) * np.abs(self.problem.savings).max():
            before = None
            while current != before:
                before = current
                for exit_index, size in enumerate(self.problem.sizes):
                    grids = _fixed(current)
                    grids[exit_index] = np.arange(size)
                    current = self.grid(grids, multiplier=float(multiplier)).positions
            best = max(best, self.grid(_fixed(current)))
        return best

    def _around(self, centre: Positions, group: range, *, width: int, points: int) -> list[NDArray[np.intp]]:
        """About ``points`` cuts within ``width`` of each exit's in ``group``, centre and infinity among them."""
        grids = _fixed(centre)
        for exit_index in group:
            last, middle = self.problem.sizes[exit_index] - 1, centre[exit_index]
            low, high = max(middle - width // 2, 0), min(middle + width // 2, last)
            spread = np.linspace(low, high, min(points - 2, high - low + 1)).round().astype(np.intp)
            grids[exit_index] = np.unique([*spread, middle, last])
        return grids


def _fixed(positions: Positions) -> list[NDArray[np.intp]]:
    return [np.asarray([cut]) for cut in positions]


def _groups(exits: int) -> Iterator[range]:
    """Overlapping runs of :data:`JOINT` exits."""
    for start in range(0, max(exits - JOINT, 0) + 1, JOINT // 2):
        yield range(start, min(start + JOINT, exits))
    if exits > JOINT and (exits - JOINT) % (JOINT // 2):
        yield range(exits - JOINT, exits)


def tally(
    axes: Sequence[NDArray[np.intp]], sizes: Sequence[int], weights: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Count (or sum the weights of) the samples that leave at an exit, for every combination of cuts up to it.

    Args:
        axes: for each free exit before, and then for this one, how many of its grid's cuts each sample reaches.
        sizes: how many cuts each of these grids has.
        weights: ``(samples,)``.

    Returns:
        ``sizes``: at ``(a, ..., z)`` the samples that reach no cut ``a, ...`` of the exits before but cut ``z`` here.
    """
    shape = [size + 1 for size in sizes]
    flat = np.ravel_multi_index(tuple(axes), tuple(shape))
    table = np.bincount(flat, weights=weights, minlength=math.prod(shape)).astype(np.float64).reshape(shape)
    table = table[..., :0:-1].cumsum(axis=-1)[..., ::-1]
    for axis in range(len(sizes) - 1):
        table = np.delete(table, -1, axis=axis).cumsum(axis=axis)
    return table


def _passed(scores: NDArray[np.float32], grids: Sequence[NDArray[np.float32]]) -> NDArray[np.intp]:
    """``(exits - 1, samples)`` how many of its exit's cuts each score reaches; NaN none."""
    passed = np.zeros(scores.shape, dtype=np.intp)
    for row, grid, values in zip(passed, grids, scores, strict=True):
        row[:] = np.where(np.isnan(values), 0, np.searchsorted(grid, values, side="right"))
    return passed


def _shared(problem: _Problem, scores: NDArray[np.float32], grids: Sequence[NDArray[np.float32]]) -> Positions:
    """The best single threshold for all exits, exactly: where each sample leaves changes only at its own scores."""
    lows = [
        np.append(np.sort(row)[np.searchsorted(np.sort(row), grid[:-1])], np.float32(np.inf))
        for row, grid in zip(scores, grids, strict=True)
    ]
    values = np.unique(np.concatenate(lows))
    saving, gain = np.zeros(len(values) + 1), np.zeros(len(values) + 1)
    reached_before = np.zeros(scores.shape[1], dtype=np.intp)
    for low, passed, gains, worth in zip(lows, problem.passed, problem.gains, problem.savings, strict=True):
        # A sample leaves here with every shared threshold that it reaches here and at no exit before.
        reached = np.where(passed > 0, np.searchsorted(values, low[passed - 1], side="right"), 0)
        rows = reached > reached_before
        for total, weight in ((saving, np.full(int(rows.sum()), worth)), (gain, gains[rows])):
            np.add.at(total, reached_before[rows], weight)
            np.subtract.at(total, reached[rows], weight)
        reached_before = np.maximum(reached_before, reached)
    feasible = gain.cumsum()[:-1] >= -problem.allowed
    best = int(np.flatnonzero(feasible)[saving.cumsum()[:-1][feasible].argmax()])
    return tuple(int(np.searchsorted(low, values[best])) for low in lows)
