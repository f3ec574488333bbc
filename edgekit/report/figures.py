"""What of two profiles can be held against each other, and how far a figure's ratio can be known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, Protocol

import numpy as np

from edgekit.distributions import t_quantile
from edgekit.errors import MeasurementError
from edgekit.measured import Energy, Interval, LatencySummary
from edgekit.records import Profile
from edgekit.report.sheets import rate_text
from edgekit.report.tables import STREAM
from edgekit.stats import independent_samples, quantile_draws, quantile_interval

__all__ = ["Figure", "Key", "figures", "has_lone_windows", "ratio_interval"]

Key = tuple[str, str, str]
"""Part (``"exit"``, ``"stream"``, ``"path"``, ``"paced"``, ``"stage"``), its name, and the quantity."""
DRAWS = 20_000


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a profile with what tells how sure it is: raw samples, or its interval.

    Attributes:
        value: the estimate, in seconds or joules, or a ratio.
        unit: ``"s"``, ``"J"`` or ``"1"``.
        level: of the quantile, with ``samples``.
        samples: nanoseconds in the order in which they were taken.
        interval: where there are no raw samples.
        freedom: degrees of freedom of that interval; ``None`` takes it as a normal one.
        comparable: two figures are of the same thing only when this is the same in both.
        accuracy: of the row, where the data has labels.
    """

    value: float
    unit: Literal["s", "J", "1"]
    level: float = 0.5
    samples: tuple[int, ...] = ()
    interval: Interval | None = None
    freedom: int | None = None
    comparable: str = ""
    accuracy: float | None = None


class _Timed(Protocol):
    @property
    def latency_ns(self) -> tuple[int, ...]: ...
    @property
    def latency(self) -> LatencySummary: ...
    @property
    def energy(self) -> Energy: ...


def figures(profile: Profile) -> dict[Key, Figure]:
    """Everything that a comparison looks at, in the order in which it is shown.

    Raises:
        MeasurementError: a row has no raw samples.
    """
    found: dict[Key, Figure] = {}
    for item in profile.exits:
        found |= _of("exit", item.name, item, item.accuracy)
    found |= _of("stream", STREAM, profile.stream, profile.stream.accuracy)
    for paced in profile.paced:
        found |= _of("paced", f"stream {rate_text(paced.rate_hz)}", paced)
    for path in profile.paths:
        found |= _of("path", path.name, path)
    last = profile.exits[-1].latency
    for stage in profile.stages:
        if stage.relative is not None and stage.relative.low > 0 and last.median_low_s > 0:
            found["stage", stage.name, "compute"] = _stage(stage.relative, last)
            relative = Figure(value=stage.relative.value, unit="1", interval=stage.relative)
            found["stage", stage.name, "relative"] = relative
    return found


def _stage(relative: Interval, whole: LatencySummary) -> Figure:
    """A stage's time as its share of all stages' compute, of the last exit's median.

    Stages are taken apart for some seconds only, in which the machine may have been faster or slower than on average.
    That hits all stages alike and leaves shares as they are; the median is of the whole run. Their intervals are
    joined on logarithms.
    """
    share, low, high = (each / (1 + each) for each in (relative.value, relative.low, relative.high))
    value = share * whole.median_s
    below = math.hypot(math.log(share / low), math.log(whole.median_s / whole.median_low_s))
    above = math.hypot(math.log(high / share), math.log(whole.median_high_s / whole.median_s))
    ends = Interval(value=value, low=value * math.exp(-below), high=value * math.exp(above))
    return Figure(value=value, unit="s", interval=ends)


def _of(part: str, name: str, item: _Timed, accuracy: float | None = None) -> dict[Key, Figure]:
    if not item.latency_ns:
        raise MeasurementError(f"'{name}' has no raw samples in one of the profiles; measure it again")
    mixed = part in ("stream", "paced")
    return {(part, name, quantity): figure for quantity, figure in _figures(item, accuracy, mixed=mixed)}


def _figures(item: _Timed, accuracy: float | None, *, mixed: bool) -> Iterator[tuple[str, Figure]]:
    """Of a stream, whose median may lie between two exits and jump when either moves, the mean.

    A percentile that has no interval in its own profile is left out.
    """
    taken, latency = item.latency_ns, item.latency
    if mixed:
        ends = Interval(value=latency.mean_s, low=latency.mean_low_s, high=latency.mean_high_s)
        yield "mean", Figure(value=latency.mean_s, unit="s", interval=ends, accuracy=accuracy)
    else:
        yield "median", Figure(value=float(np.median(taken)) / 1e9, unit="s", samples=taken, accuracy=accuracy)
    if latency.p90_s is not None and quantile_interval(np.asarray(taken, np.float64), 0.9) is not None:
        yield "p90", Figure(value=float(np.quantile(taken, 0.9)) / 1e9, unit="s", level=0.9, samples=taken)
    spent = item.energy
    if spent.gross_j and spent.low_j is not None and spent.high_j is not None:
        yield (
            "energy",
            Figure(
                value=spent.gross_j,
                unit="J",
                interval=Interval(value=spent.gross_j, low=spent.low_j, high=spent.high_j),
                freedom=max(spent.windows - 1, 1),
                comparable=f"{spent.meter}: {spent.scope} ({spent.method})",
            ),
        )


def has_lone_windows(profile: Profile) -> bool:
    """Whether it has energy of too few windows for an interval, which cannot be compared."""
    spent = [*(item.energy for item in profile.exits), profile.stream.energy]
    return any(each.gross_j is not None and each.low_j is None for each in spent)


def ratio_interval(
    mine: Figure, theirs: Figure, *, confidence: float, usual: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Ends of the interval of ``theirs / mine``.

    Quantiles of raw samples are drawn for both, as many independent samples as a run is worth. Two intervals become
    one by the method of variance estimates recovery, on logarithms (Zou and Donner, Stat. Med. 27, 2008): an interval
    that reaches down to zero leaves an end of theirs at zero or without bound.

    Args:
        mine: of the first profile.
        theirs: of the other.
        confidence: of the interval wanted.
        usual: confidence of the intervals in the profiles.
        rng: of the draws.
    """
    if mine.samples and theirs.samples:
        above, below = (_drawn(figure, rng) for figure in (theirs, mine))
        low, high = np.quantile(above / below, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)
    (below_low, below_high), (above_low, above_high) = (
        _logarithms(figure, confidence=confidence, usual=usual) for figure in (mine, theirs)
    )
    middle = math.log(theirs.value / mine.value)
    return math.exp(middle - math.hypot(above_low, below_high)), math.exp(middle + math.hypot(above_high, below_low))


def _drawn(figure: Figure, rng: np.random.Generator) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    samples = np.asarray(figure.samples, np.float64)
    worth = independent_samples(samples, figure.level)
    return quantile_draws(np.sort(samples), figure.level, independent=worth, draws=DRAWS, rng=rng)


def _logarithms(figure: Figure, *, confidence: float, usual: float) -> tuple[float, float]:
    """How far the logarithm may lie below and above that of the value, at another confidence than the interval's."""

    def reach(share: float) -> float:
        end = (1 + share) / 2
        return NormalDist().inv_cdf(end) if figure.freedom is None else t_quantile(end, figure.freedom)

    wider = reach(confidence) / reach(usual)
    found = figure.interval
    if found is None:
        return math.inf, math.inf
    low, high = (figure.value + wider * (end - figure.value) for end in (found.low, found.high))
    below = math.log(figure.value / low) if low > 0 else math.inf
    return below, math.log(high / figure.value)
