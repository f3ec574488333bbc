"""Two profiles at one speed of their machine, by the reference work that both did in every round.

A machine's speed wanders by some percent over minutes: a neighbour on the same processor, heat. What it does to an
exit's latency shows within each run, as the slope of the exit's logarithm over the reference's; with that slope both
runs are told at their mean speed (analysis of covariance: Fisher, Statistical Methods for Research Workers, 4th
edition, 1932). What it takes out is the machine's alone: the reference does not know the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.records import ExitProfile, PathProfile, Profile, StreamProfile
from edgekit.report.tables import STREAM
from edgekit.stats import independent_samples, summarize

__all__ = ["OneSpeed", "at_one_speed"]

BLOCK_S = 1.0
"""Of samples that count as taken at one speed."""
FEWEST = 20
"""Such blocks in a run."""
FARTHEST = 0.10
"""Of the speeds of two runs from each other: beyond that, what holds within the runs need not hold between them."""
UNSURE = 0.01
"""What two standard errors of a slope may be worth between the two runs."""

Timed = ExitProfile | PathProfile | StreamProfile
Row = TypeVar("Row", ExitProfile, PathProfile, StreamProfile)


@dataclass(frozen=True, kw_only=True)
class OneSpeed:
    """What became of two profiles.

    Attributes:
        first: the one, at the mean speed of both; as it was where that could not be told.
        other: likewise.
        slower: by how much the reference took longer in the other, a share.
        doubt: standard error that the slope leaves in the logarithm of a latency's ratio, by name of the row.
        reason: why they are as they were; empty when they are not.
    """

    first: Profile
    other: Profile
    slower: float
    doubt: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


def at_one_speed(first: Profile, other: Profile) -> OneSpeed | None:
    """Latencies of exits, paths and stream, and their summaries, as they would have been at the mean speed of both.

    Returns:
        ``None`` where a profile has no reference, or is too short for one.
    """
    paces = [_pace(first), _pace(other)]
    mine, theirs = paces
    if mine is None or theirs is None:
        return None
    apart = float(theirs.mean() - mine.mean())
    slower = math.expm1(apart)
    if abs(apart) > FARTHEST:
        return OneSpeed(first=first, other=other, slower=slower, reason="too much to tell what it does to latencies")
    given, wanted = _rows(first), _rows(other)
    slopes, doubt = {}, {}
    for name in given.keys() & wanted.keys():
        found = _slope(mine, given[name].latency_ns, theirs, wanted[name].latency_ns)
        if found is None:
            return None
        slopes[name], doubt[name] = found[0], found[1] * abs(apart)
        # The stream mixes exits, whose share in a block is no matter of speed: of all slopes its is the least sure.
        if name != STREAM and 2 * doubt[name] > UNSURE:
            return OneSpeed(
                first=first, other=other, slower=slower, reason="too even within the runs to tell what it does"
            )
    middle = float(mine.mean() + theirs.mean()) / 2
    told = [
        _at(profile, {name: np.exp(slope * (middle - pace)) for name, slope in slopes.items()})
        for profile, pace in ((first, mine), (other, theirs))
    ]
    return OneSpeed(first=told[0], other=told[1], slower=slower, doubt=doubt)


def _rows(profile: Profile) -> dict[str, Timed]:
    found: dict[str, Timed] = {each.name: each for each in profile.exits}
    return {**found, **{each.name: each for each in profile.paths}, STREAM: profile.stream}


def _at(profile: Profile, factors: Mapping[str, NDArray[np.float64]]) -> Profile:
    """A profile whose latencies were multiplied by a factor for each block, by name of the row."""

    def told(name: str, row: Row) -> Row:
        if name not in factors:
            return row
        parts = np.array_split(np.asarray(row.latency_ns, dtype=np.float64), len(factors[name]))
        taken = np.concatenate([part * factor for part, factor in zip(parts, factors[name], strict=True)])
        latency_ns = tuple(np.rint(taken).astype(np.int64).tolist())
        return msgspec.structs.replace(row, latency_ns=latency_ns, latency=summarize(latency_ns))

    return msgspec.structs.replace(
        profile,
        exits=tuple(told(each.name, each) for each in profile.exits),
        paths=tuple(told(each.name, each) for each in profile.paths),
        stream=told(STREAM, profile.stream),
    )


def _pace(profile: Profile) -> NDArray[np.float64] | None:
    """Logarithm of the reference's median in each block of time."""
    taken = np.asarray(profile.reference_ns, dtype=np.float64)
    blocks = int(profile.settings.get("timed_s", 0) / BLOCK_S)
    if blocks < FEWEST or taken.size < blocks or taken.min() <= 0:
        return None
    return np.array([np.log(np.median(part)) for part in np.array_split(taken, blocks)])


def _slope(
    mine: NDArray[np.float64], my_ns: tuple[int, ...], theirs: NDArray[np.float64], their_ns: tuple[int, ...]
) -> tuple[float, float] | None:
    """What a share of the reference's time is worth in a latency's, within both runs, and its standard error."""
    xs, ys = [], []
    for pace, taken_ns in ((mine, my_ns), (theirs, their_ns)):
        taken = np.asarray(taken_ns, dtype=np.float64)
        if taken.size < len(pace) or taken.min() <= 0:
            return None
        logarithms = np.array([part.mean() for part in np.array_split(np.log(taken), len(pace))])
        xs.append(pace - pace.mean())
        ys.append(logarithms - logarithms.mean())
    x, y = np.concatenate(xs), np.concatenate(ys)
    spread = float(x @ x)
    if spread == 0:
        return 0.0, math.inf
    slope = float(x @ y) / spread
    left = y - slope * x
    worth = independent_samples(left, 0.5)
    return slope, math.sqrt(float(left @ left) / max(worth - 3, 1) / spread)
