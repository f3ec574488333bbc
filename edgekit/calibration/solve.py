"""Threshold vectors worth testing, in the order in which to test them, found on samples that will not test them.

What is proposed here affects cost only, never the validity of a certificate. A fixed-sequence test walks a path from
its safe end and stops at its first failure, so two things make a path good: what it costs where its risk on *new*
samples reaches the target, and that nothing early in it fails.

Both argue against taking the best vectors in hindsight. Of the 10^5 combinations of a grid the best on a few thousand
samples is largely the luckiest, and neighbours on such a front send different samples to different exits, each a new
chance to fail. So the path starts from one family: a threshold shared by all exits that falls step by step, under which
whoever leaves stays gone. Every freedom beyond that has to pay on parts of the samples held out from finding it:

- an exit's threshold is shifted against the others', or the exit switched off, where each of :data:`FOLDS` parts gains;
- the free front of :mod:`edgekit.calibration.frontier` replaces the family where it is cheaper on either half of the
  samples when it was found on the other.

A path is judged by what a test can pass. A loss that is -1 as often as 1 has no risk but much noise, so the order is by
``risk + DOUBT * deviation / sqrt(TESTED)``: about the smallest target that a test of so many samples mostly accepts.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.candidates import Candidate, Losses, Samples
from edgekit.calibration.frontier import quantile_cuts, search
from edgekit.errors import CalibrationError

__all__ = ["Candidate", "msdnet_budget", "propose_budget", "propose_path", "shared_threshold_path"]

SEARCHED = 2**15
"""Samples that are searched; of more, so many are drawn, and the candidates found are then evaluated on all."""
TESTED = 1000
"""Samples that a path is expected to be tested on."""
DOUBT = 2.0
"""Standard errors between a risk and the target that it is expected to pass: a test asks for 1.3 at delta = 0.1, and
the draw may be unkind."""
TARGETS = np.asarray([0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1])
"""Risks at which the cost of paths is compared."""
DENSE = 0.15
"""Up to here a path is dense: targets lie below."""
FALL = 0.5
"""How much a fall of the cost to nothing counts, where points are spread, against a rise of the target to DENSE."""
STEPS = 1024
"""Steps of the shared threshold, even in the logit of its rank among all scores: fine where nearly all are surer."""
LOGITS = 9.0
"""Where these steps begin and end."""
CHANGES = (0, -128, 128, -64, 64)
"""What is tried at each exit in turn: 0 switches it, others lower its threshold by so many steps against the rest."""
FOLDS = 5
"""Parts of the samples that a shift or switch has to pay on, each."""
MARGIN = 0.01
"""Share of the cost that a freedom has to save, so that it is not taken for noise."""
COMPARED = 64
"""Points of the paths that are compared."""
FEWEST = 400
"""Samples below which no freedom is tried."""
PENALTY = 0.2
"""Of the squared loss, added to the loss for the free front, so that it avoids noise as the order of a path does."""

Floats = NDArray[np.float64]


def propose_path(
    scores: NDArray[np.float32],
    losses: Losses,
    costs: Sequence[float],
    *,
    heads: Sequence[float] | None = None,
    points: int = 64,
    seed: int = 0,
) -> tuple[Candidate, ...]:
    """Candidates for a fixed-sequence test: never-exit, then ever cheaper and riskier ones.

    They are ordered by ``risk + DOUBT * deviation / sqrt(TESTED)``, which for losses of 0 and 1 is the order of risk,
    and spaced evenly in its square root, the scale on which an estimated rate has even noise.

    Args:
        scores: ``(exits - 1, samples) float32``; a sample leaves at the first exit whose score reaches its threshold,
            NaN never.
        losses: ``(exits, samples)`` of leaving at each exit, any real or integer dtype; 0 at the last.
        costs: of leaving at each exit, the heads of all exits before it run; need not rise with depth.
        heads: what each exit's head costs, saved behind an exit that nobody takes; nothing if not given.
        points: most candidates.
        seed: of what is drawn: the part that is searched, and the folds.

    Raises:
        CalibrationError: shapes that do not fit, or values that are no numbers.
    """
    samples = Samples.checked(scores, losses, costs, heads)
    _require_points(points)
    drawn = samples.drawn(SEARCHED, seed)
    return _path(samples, _vectors(drawn, points - 1, seed))


def shared_threshold_path(
    scores: NDArray[np.float32],
    losses: Losses,
    costs: Sequence[float],
    *,
    heads: Sequence[float] | None = None,
    points: int = 64,
    seed: int = 0,
) -> tuple[Candidate, ...]:
    """The baseline: candidates with one threshold for all exits. Arguments and errors of :func:`propose_path`."""
    samples = Samples.checked(scores, losses, costs, heads)
    _require_points(points)
    drawn = samples.drawn(SEARCHED, seed)
    return _path(samples, _Family(drawn).path(_Shape.plain(len(scores)), points - 1))


def propose_budget(
    scores: NDArray[np.float32],
    losses: Losses,
    costs: Sequence[float],
    *,
    budget: float,
    heads: Sequence[float] | None = None,
    seed: int = 0,
) -> Candidate:
    """The safest candidate whose mean cost on these samples is within ``budget``: the first such of a dense path.

    Not the one of least risk in hindsight, which on new samples tends to be riskier.

    Args:
        scores: as in :func:`propose_path`.
        losses: as there.
        costs: as there.
        budget: mean cost, in the unit of ``costs``.
        heads: as there.
        seed: of the draw of what is searched.

    Raises:
        CalibrationError: nothing is that cheap; or as in :func:`propose_path`.
    """
    samples = Samples.checked(scores, losses, costs, heads)
    drawn = samples.drawn(SEARCHED, seed)
    vectors = np.concatenate([samples.never[None], _vectors(drawn, 3 * STEPS, seed)])
    found = bisect_left(range(len(vectors)), -budget, key=lambda place: -samples.evaluate(vectors[place]).cost)
    candidate = samples.evaluate(vectors[min(found, len(vectors) - 1)])
    if candidate.cost > budget:
        raise CalibrationError(f"no policy found costs {budget} or less; the cheapest costs {candidate.cost}")
    return candidate


def msdnet_budget(scores: NDArray[np.float32], costs: Sequence[float], *, budget: float) -> tuple[float, ...]:
    """The baseline for budgets: thresholds as MSDNet's published ``adaptive_inference.py`` finds them.

    Huang et al.: Multi-Scale Dense Networks for Resource Efficient Image Classification, 2018, section 3. A share
    proportional to ``p**k`` of the samples is meant to leave at exit ``k = 1 ... K``; each threshold is the score of
    the last sample of that share, counted among those still there. Of ``p = 1/20, 2/20 ... 40/20`` the one of largest
    mean cost within ``budget`` is taken. The losses play no part.

    Args:
        scores: ``(exits - 1, samples) float32``; max softmax in the original.
        costs: of leaving at each exit.
        budget: mean cost, in the unit of ``costs``.

    Raises:
        CalibrationError: no ``p`` is that cheap; or as in :func:`propose_path`.
    """
    samples = Samples.checked(scores, np.zeros((len(costs), scores.shape[-1]), dtype=np.int8), costs)
    found = [samples.evaluate(_msdnet_thresholds(scores, step / 20)) for step in range(1, 41)]
    within = [candidate for candidate in found if candidate.cost <= budget]
    if not within:
        least = min(candidate.cost for candidate in found)
        raise CalibrationError(f"MSDNet's solver finds nothing that costs {budget} or less; its cheapest is {least}")
    return max(within, key=lambda candidate: candidate.cost).thresholds


def _require_points(points: int) -> None:
    if points < 2:
        raise CalibrationError(f"a path has never-exit and at least one candidate more: points is {points}")


def _msdnet_thresholds(scores: NDArray[np.float32], ratio: float) -> NDArray[np.float32]:
    """For one ``p``, in float32 as the original."""
    shares = np.exp(np.log(np.float32(ratio)) * np.arange(1, len(scores) + 2, dtype=np.float32))
    shares /= shares.sum()
    thresholds = np.full(len(scores), np.inf, dtype=np.float32)
    stays = np.ones(scores.shape[1], dtype=bool)
    for index, row in enumerate(scores):
        wanted = math.floor(np.float32(len(stays)) * shares[index])
        left = np.sort(row[stays & ~np.isnan(row)])[::-1]
        if 0 < wanted <= len(left):
            thresholds[index] = left[wanted - 1]
        stays &= ~(row >= thresholds[index])
    return thresholds


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """How the thresholds of a family differ: steps that each exit's is below the shared one, and who takes part."""

    shifts: tuple[int, ...]
    on: tuple[bool, ...]

    @classmethod
    def plain(cls, early: int) -> _Shape:
        return cls(shifts=(0,) * early, on=(True,) * early)

    def moved(self, index: int, change: int) -> _Shape:
        """One exit's threshold so many steps lower; 0 switches the exit."""
        shifts, on = list(self.shifts), list(self.on)
        shifts[index] += change
        on[index] ^= change == 0
        return _Shape(shifts=tuple(shifts), on=tuple(on))


class _Family:
    """Samples by the steps that their scores reach, for thresholds that fall together, level by level.

    At level ``t``, from ``3 * STEPS`` (nobody leaves) down to 1, an exit lets go whoever has reached its step
    ``t - STEPS - shift``. Whoever leaves at some level leaves at all lower ones too, there or earlier.
    """

    def __init__(self, samples: Samples) -> None:
        known = samples.scores[~np.isnan(samples.scores)]
        ranks = 1 / (1 + np.exp(-np.linspace(-LOGITS, LOGITS, STEPS - 1)))
        self.steps = quantile_cuts(known, np.append(0.0, ranks)) if len(known) else np.zeros(STEPS, dtype=np.float32)
        self.samples = samples
        self.losses = samples.losses.astype(np.float64)
        self.reached = np.searchsorted(self.steps, samples.scores, side="right")
        self.reached[np.isnan(samples.scores)] = -3 * STEPS

    def thresholds(self, shape: _Shape, levels: NDArray[np.intp]) -> NDArray[np.float32]:
        """``(levels, exits - 1)``."""
        steps = levels[:, None] - STEPS - np.asarray(shape.shifts, dtype=np.intp)
        values = np.append(self.steps, np.float32(np.inf))[np.clip(steps - 1, 0, STEPS)]
        values[:, ~np.asarray(shape.on, dtype=bool)] = np.inf
        return np.asarray(values)

    def curve(self, shape: _Shape, rows: NDArray[np.intp] | slice) -> tuple[Floats, Floats]:
        """Passable target and mean cost of every level, the first to the last, on some of the samples."""
        off = ~np.asarray(shape.on, dtype=bool)
        price = self.samples.costs - np.append(0.0, np.where(off, self.samples.heads[:-1], 0.0).cumsum())
        last = self.losses[-1][rows]
        left = np.zeros(len(last), dtype=np.intp)  # level at which a sample is gone before this exit
        sums = np.zeros((3, 3 * STEPS + 1))
        for index in np.flatnonzero(~off):
            level = np.clip(self.reached[index][rows] + shape.shifts[index] + STEPS, 0, 3 * STEPS)
            here = np.flatnonzero(level > left)
            loss = self.losses[index][rows][here]
            weights = (loss - last[here], loss**2 - last[here] ** 2, np.full(len(here), price[index] - price[-1]))
            for total, weight in zip(sums, weights, strict=True):  # of levels above left, up to level
                total += np.bincount(level[here], weights=weight, minlength=len(total))
                total -= np.bincount(left[here], weights=weight, minlength=len(total))
            left = np.maximum(left, level)
        risk, square, cost = sums[:, :0:-1].cumsum(axis=1) / len(last)
        risk, square, cost = risk + last.mean(), square + (last**2).mean(), cost + price[-1]
        cost[0] = self.samples.costs[-1] - self.samples.heads[:-1].sum()
        return _passable(risk, np.sqrt(np.maximum(square - risk**2, 0))), cost

    def path(self, shape: _Shape, points: int) -> NDArray[np.float32]:
        """``(vectors, exits - 1)`` thresholds of at most so many levels."""
        if self.losses.size == 0 or not shape.shifts:
            return np.empty((0, len(shape.shifts)), dtype=np.float32)
        targets, costs = self.curve(shape, slice(None))
        front = _ladder(targets, costs)
        chosen = front[_spread(targets[front], points, costs=costs[front])]
        return self.thresholds(shape, 3 * STEPS - chosen)


def _passable(risk: Floats, deviation: Floats) -> Floats:
    """About the smallest target that a test of :data:`TESTED` samples mostly accepts."""
    return np.asarray(risk + DOUBT * deviation / math.sqrt(TESTED))


def _walked(targets: Floats, costs: Floats) -> float:
    """Least cost before a path that starts with never-exit exceeds a target, on average over :data:`TARGETS`."""
    reached = np.searchsorted(np.maximum.accumulate(targets), TARGETS, side="right") - 1
    return float(np.minimum.accumulate(costs)[np.maximum(reached, 0)].mean())


def _vectors(samples: Samples, points: int, seed: int) -> NDArray[np.float32]:
    """``(vectors, exits - 1)`` thresholds, at most ``points``, in the order of the targets they pass."""
    return _free(samples, points) if _free_pays(samples, seed) else _nested(samples, points, seed)


def _nested(samples: Samples, points: int, seed: int) -> NDArray[np.float32]:
    """Thresholds of the family, with every shift and switch that pays on each fold."""
    family, shape = _Family(samples), _Shape.plain(len(samples.scores))
    if len(samples) < FEWEST:
        return family.path(shape, points)
    shuffled = np.random.default_rng(seed).permutation(len(samples))
    folds = [np.sort(shuffled[start::FOLDS]) for start in range(FOLDS)]
    best = [_walked(*family.curve(shape, rows)) for rows in folds]
    for change in CHANGES:
        for index in range(len(shape.shifts)):
            move = shape.moved(index, change)
            found = [_walked(*family.curve(move, rows)) for rows in folds]
            if all(new < old * (1 - MARGIN) for new, old in zip(found, best, strict=True)):
                best, shape = found, move
    return family.path(shape, points)


def _free(samples: Samples, points: int) -> NDArray[np.float32]:
    """``(vectors, exits - 1)`` thresholds of the free front, by rising penalised loss."""
    losses = samples.losses.astype(np.float64)
    penalised = Samples(
        scores=samples.scores, losses=losses + PENALTY * losses**2, costs=samples.costs, heads=samples.heads
    )
    pool = search(penalised)
    return pool.thresholds[_spread(pool.loss, points)]


def _free_pays(samples: Samples, seed: int) -> bool:
    """Whether the free front is cheaper than the family on either half of the samples, found on the other."""
    if len(samples) < FEWEST:
        return False
    shuffled = np.random.default_rng(seed).permutation(len(samples))
    halves = [samples.rows(np.sort(shuffled[start::2])) for start in range(2)]
    for found_on, judge in (halves, halves[::-1]):
        costs = []
        for vectors in (_free(found_on, COMPARED), _nested(found_on, COMPARED, seed)):
            path = [judge.evaluate(row) for row in (judge.never, *vectors)]
            risk, deviation = (np.asarray([getattr(each, key) for each in path]) for key in ("risk", "deviation"))
            costs.append(_walked(_passable(risk, deviation), np.asarray([each.cost for each in path])))
        if costs[0] >= costs[1] * (1 - MARGIN):
            return False
    return True


def _ladder(targets: Floats, costs: Floats) -> NDArray[np.intp]:
    """Ever cheaper policies by rising target. Of equal targets, as where nothing was lost yet, all: dearest first.

    The dearest of them lets the fewest leave, so it is the safest on new samples, and a test begins there.
    """
    order = np.lexsort((-costs, targets))
    before = np.append(np.inf, np.minimum.accumulate(costs[order])[:-1])
    return np.asarray(order[costs[order] < before])


def _spread(targets: Floats, points: int, *, costs: Floats | None = None) -> NDArray[np.intp]:
    """At most ``points`` indices of ascending targets, even in their square root, sparse above :data:`DENSE`.

    With falling ``costs`` what these fall by counts as well, so that equal targets are spread over.
    """
    if len(targets) <= points:
        return np.arange(len(targets))
    place = np.where(targets > 0, np.sqrt(np.maximum(targets, 0) / DENSE), targets / DENSE)
    place = np.where(place > 1, 1 + (place - 1) / 8, place)
    if costs is not None:
        place = place + FALL * (costs[0] - costs) / max(abs(costs[0]), 1e-300)
    return np.unique(np.searchsorted(place, np.linspace(place[0], place[-1], points), side="right") - 1)


def _path(samples: Samples, vectors: NDArray[np.float32]) -> tuple[Candidate, ...]:
    """Never-exit, then what is cheaper, in the order of the targets that it passes on all samples."""
    never = samples.evaluate(samples.never)
    found = [each for each in map(samples.evaluate, vectors) if each.cost < never.cost]
    risk, deviation = np.asarray([each.risk for each in found]), np.asarray([each.deviation for each in found])
    front = _ladder(_passable(risk, deviation), np.asarray([each.cost for each in found]))
    return never, *(found[index] for index in front)
