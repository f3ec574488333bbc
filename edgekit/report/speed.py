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
from statistics import NormalDist
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.distributions import t_quantile
from edgekit.records import ExitProfile, PathProfile, Profile, StreamProfile
from edgekit.report.tables import STREAM
from edgekit.stats import independent_samples, summarize

__all__ = ["OneSpeed", "at_one_speed"]

BLOCK_S = 1.0
"""Of samples that count as taken at one speed."""
ROUNDS = 4
"""In such a block at least, which is longer where they last."""
FEWEST = 20
"""Such blocks in a run."""
FARTHEST = 0.10
"""Of the speeds of two runs from each other: beyond that, what holds within the runs need not hold between them."""
RELIABLE = 0.5
"""Least share of what the reference's time varies by, from block to block, that is the machine's and not its own."""
UNSURE = 0.01
"""What two standard errors of a slope may be worth between the two runs, if they are more than half of the slope."""
CONFIDENCE = 0.999
"""At which the error of a slope of few independent blocks is made to reach as far as a normal one of its size."""

Timed = ExitProfile | PathProfile | StreamProfile
Row = TypeVar("Row", ExitProfile, PathProfile, StreamProfile)
Array = NDArray[np.float64]


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

    Args:
        first: of one machine, runtime and network with the other.
        other: to be held against it.

    Returns:
        ``None`` where a profile has no reference, or too few rounds, or where the reference's library changed.
    """
    mine, theirs = _Pace.of(first), _Pace.of(other)
    if mine is None or theirs is None or first.before.versions.get("numpy") != other.before.versions.get("numpy"):
        return None
    apart = theirs.mean - mine.mean
    slower = math.expm1(apart)
    even = "too even within the runs to tell what it does"
    if abs(apart) > FARTHEST:
        return OneSpeed(first=first, other=other, slower=slower, reason="too much to tell what it does to latencies")
    if _reliability(mine, theirs) < RELIABLE:
        return OneSpeed(first=first, other=other, slower=slower, reason=even)
    given, wanted = _rows(first), _rows(other)
    slopes, doubt = {}, {}
    for name in given.keys() & wanted.keys():
        parts = [_blocks(row, pace) for row, pace in ((given[name], mine), (wanted[name], theirs))]
        if parts[0] is None or parts[1] is None:
            return None
        slopes[name], error = _slope((mine, theirs), (parts[0], parts[1]))
        doubt[name] = error * abs(apart)
        if 2 * doubt[name] > UNSURE and 4 * error > slopes[name]:
            return OneSpeed(first=first, other=other, slower=slower, reason=even)
    middle = (mine.mean + theirs.mean) / 2
    told = [
        _at(profile, {name: np.exp(slope * (middle - pace.blocks)) for name, slope in slopes.items()})
        for profile, pace in ((first, mine), (other, theirs))
    ]
    return OneSpeed(first=told[0], other=told[1], slower=slower, doubt=doubt)


@dataclass(frozen=True)
class _Pace:
    """The reference over a run.

    Attributes:
        blocks: ``(blocks,)``: logarithm of its median in each block of time.
        halves: ``(2, blocks)``: of its odd rounds alone, and of its even ones.
    """

    blocks: Array
    halves: Array

    @property
    def mean(self) -> float:
        return float(self.blocks.mean())

    @classmethod
    def of(cls, profile: Profile) -> _Pace | None:
        taken = np.asarray(profile.reference_ns, dtype=np.float64)
        count = min(int(profile.settings.get("timed_s", 0) / BLOCK_S), taken.size // ROUNDS)
        # A round that was broken off has its reference and not all of its rows; more must not be missing.
        missing = abs(taken.size - profile.settings.get("rounds", 0))
        if count < FEWEST or missing > profile.settings.get("parts", 1) or taken.min() <= 0:
            return None
        parts = np.array_split(np.log(taken), count)
        return cls(
            np.array([np.median(part) for part in parts]),
            np.array([[np.median(part[start::2]) for part in parts] for start in (0, 1)]),
        )


def _reliability(*paces: _Pace) -> float:
    """Share of the variance between blocks that is not the reference's own noise, which its halves do not share."""
    shared = sum(float(np.prod(pace.halves - pace.halves.mean(axis=1, keepdims=True), axis=0).sum()) for pace in paces)
    whole = sum(float(np.square(pace.blocks - pace.mean).sum()) for pace in paces)
    # What is constant but for rounding varies by nothing.
    return min(shared / whole, 1.0) if whole > 1e-12 else 0.0


def _rows(profile: Profile) -> dict[str, Timed]:
    found: dict[str, Timed] = {each.name: each for each in profile.exits}
    return {**found, **{each.name: each for each in profile.paths}, STREAM: profile.stream}


def _blocks(row: Timed, pace: _Pace) -> Array | None:
    """``(blocks,)``: mean logarithm of a row's latencies; of a stream less that of the exit where each sample left."""
    taken = np.asarray(row.latency_ns, dtype=np.float64)
    if taken.size < len(pace.blocks) or taken.min() <= 0:
        return None
    logarithms = np.log(taken)
    if isinstance(row, StreamProfile):
        exits = np.asarray(row.exits)
        sums, counts = np.bincount(exits, weights=logarithms), np.bincount(exits)
        logarithms -= (sums / np.maximum(counts, 1))[exits]
    return np.array([part.mean() for part in np.array_split(logarithms, len(pace.blocks))])


def _slope(paces: tuple[_Pace, _Pace], rows: tuple[Array, Array]) -> tuple[float, float]:
    """What a share of the reference's time is worth in a latency's, within both runs, and its standard error.

    The reference's own noise makes a slope of least squares too small, by its reliability (Fuller, Measurement Error
    Models, 1987, section 1.1).
    """
    x = np.concatenate([pace.blocks - pace.mean for pace in paces])
    y = np.concatenate([row - row.mean() for row in rows])
    spread, reliable = float(x @ x), _reliability(*paces)
    slope = float(x @ y) / spread
    left = y - slope * x
    freedom = max(math.floor(independent_samples(left, 0.5)) - 3, 1)
    wider = t_quantile(CONFIDENCE, freedom) / NormalDist().inv_cdf(CONFIDENCE)
    return slope / reliable, wider * math.sqrt(float(left @ left) / freedom / spread) / reliable


def _at(profile: Profile, factors: Mapping[str, Array]) -> Profile:
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
