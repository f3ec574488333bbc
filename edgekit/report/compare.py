"""Profiles held against the first: what got worse, with intervals that hold all at once, and what else differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MeasurementError
from edgekit.records import Profile
from edgekit.report.changes import Change, changes, machine_changes
from edgekit.report.figures import Figure, Key, figures, has_lone_windows, ratio_interval
from edgekit.report.formats import NONE, minus, percent, points
from edgekit.report.tables import labels

__all__ = ["TOLERANCE", "Comparison", "Difference", "Pair", "compare"]

TOLERANCE = 0.05
"""What two runs on one machine may differ by unless said otherwise; docs/profiling.md has what was measured."""
LOPSIDED, CLOSE = 1.6, 0.05
"""An interval with one side so many times as long as the other, and longer than that, is told by its ends."""
QUANTITIES = {
    "median": "median",
    "mean": "mean",
    "p90": "p90",
    "energy": "energy",
    "compute": "compute time",
    "relative": "relative compute time",
}
FELT = 0.01
"""By how much the reference work must have changed to be told: where it lies in memory is worth half of that."""
FOLLOWS = 1.5
"""How many times the reference's change a latency may change with the machine: 0.5 to 1.4 were measured within runs."""
STATISTICS: dict[str, Callable[[NDArray[np.float64]], Any]] = {
    "median": np.median,
    "mean": np.mean,
    "p90": partial(np.quantile, q=0.9),
    "compute": np.median,
}
"""Of the reference, that a quantity of a latency is held against."""
BORNE_OUT = 0.5
"""Of the tolerance is how far a stage's own time must have changed for its relative one to count."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One figure in two profiles.

    Attributes:
        part: ``"exit"``, ``"stream"``, ``"paced"``, ``"path"`` or ``"stage"``.
        name: of the exit, path, rate or stage.
        quantity: ``"median"`` latency or, of a stream, ``"mean"``; ``"p90"``; gross ``"energy"``; ``"compute"``, a
            stage's share of the last exit's median, or ``"relative"``, its time over that of the other stages.
        unit: of the two values, ``"s"``, ``"J"`` or ``"1"``.
        baseline: in the first profile.
        other: in the other.
        change: ``other / baseline - 1``.
        low: lower end of its simultaneous interval; -1 where it is not known.
        high: upper end; infinite, in JSON ``null``, where it is not known: of energy whose own interval reaches zero.
        verdict: ``"worse"`` or ``"better"`` when that interval lies beyond the tolerance, ``"same"`` when it lies
            within, ``"unclear"`` when it does neither: measure for longer. A latency is unclear as well where the
            interval does not lie beyond what the machine may account for as well: what the reference took longer,
            times :data:`FOLLOWS`. A relative figure, whose interval does not hold what the whole machine does, is also
            unclear unless the stage's own time changed that way, by half the tolerance or more: a stage is not slow
            because others became fast.
        accuracy_change: of the accuracies, where both have labels.
    """

    part: str
    name: str
    quantity: str
    unit: Literal["s", "J", "1"]
    baseline: float
    other: float
    change: float
    low: float
    high: float
    verdict: Literal["worse", "better", "same", "unclear"]
    accuracy_change: float | None = None

    @property
    def what(self) -> str:
        """``p90 of exit2``."""
        kind = {"stream": "the ", "paced": "the ", "stage": "stage "}.get(self.part, "")
        return f"{QUANTITIES[self.quantity]} of {kind}{self.name}"

    @property
    def by(self) -> str:
        """``6.0 % ± 2.1 %``, or ``6.0 % (3.5 to 12.0 %)`` where the interval is lopsided."""
        size, low, high = self.change, self.low, self.high
        if self.verdict == "better":
            size, low, high = -size, -high, -low
        sign = "" if self.verdict in ("worse", "better") else "+"
        sides = (high - size, size - low)
        if self.low <= -1 or math.isinf(self.high):
            ends = "(interval not known)"
        elif max(sides) <= LOPSIDED * min(sides) or max(sides) < CLOSE:
            ends = f"± {percent(max(sides))}"
        else:
            ends = f"({100 * low:.1f} to {percent(high)})"
        return minus(f"{100 * size:{sign}.1f} % {ends}")

    @property
    def text(self) -> str:
        """``worse by 6.0 % ± 2.1 %``."""
        if self.verdict in ("worse", "better"):
            return f"{self.verdict} by {self.by}"
        return f"{'no change' if self.verdict == 'same' else 'unclear'}: {self.by}"

    @property
    def sentence(self) -> str:
        """``p90 of exit2 got worse by 6.0 % ± 2.1 %``."""
        return f"{self.what} got {self.text}"

    @property
    def accuracy_text(self) -> str:
        """``−0.7 points``."""
        return NONE if self.accuracy_change is None else points(self.accuracy_change)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One profile held against the first.

    Attributes:
        other: its label.
        differences: exits in order, then stream, rates, paths and stages.
        changes: of machine, runtime, network, policy, data and protocol.
        notes: what could not be compared, and what makes the comparison doubtful.
        machines_differ: other host, processor, runtime or device: a difference is then one of machines, too.
        slower: by how much the reference work took longer, a share; ``None`` where it cannot be told.
    """

    other: str
    differences: tuple[Difference, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    machines_differ: bool = False
    slower: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Profiles held against the first of them.

    Attributes:
        baseline: label of the first.
        pairs: one for each other profile.
        tolerance: what is called worse lies beyond it.
        confidence: that all intervals hold at once.
        compared: how many figures.
        worse: a sentence for each figure that got worse; empty is what a build hopes for.
    """

    baseline: str
    pairs: tuple[Pair, ...]
    tolerance: float
    confidence: float
    compared: int
    worse: tuple[str, ...]

    @property
    def caveat(self) -> str:
        """What the intervals say, and what they do not cover."""
        return (
            f"All {self.compared} intervals hold at once with {percent(self.confidence, digits=0)} confidence "
            "(Bonferroni) and count what drifts within a run. Worse and better lie wholly beyond a tolerance of "
            f"{percent(self.tolerance)}, which stands for what changes from run to run."
        )


def compare(
    profiles: Sequence[Profile],
    *,
    other_networks: bool = False,
    other_hosts: bool = False,
    invalid: bool = False,
    tolerance: float = TOLERANCE,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Hold profiles against the first of them.

    Args:
        profiles: two or more.
        other_networks: compare although the plans differ; exits are then matched by name.
        other_hosts: compare although the machines or runtimes differ; that is then said wherever something is worse.
        invalid: compare although a profile broke a rule of the protocol or is incomplete.
        tolerance: share that two runs on one machine may differ by.
        confidence: that all intervals hold at once.
        seed: of the draws; the same seed gives the same intervals.

    Raises:
        MeasurementError: fewer than two profiles, or some that are not comparable; the message names why.
    """
    if len(profiles) < 2:
        raise MeasurementError(f"a comparison needs two profiles or more, not {len(profiles)}")
    if not 0 <= tolerance < 1 or not 0 < confidence < 1:
        raise MeasurementError(f"tolerance {tolerance} and confidence {confidence}: both are shares below 1")
    names = labels(profiles)
    if not invalid:
        _refuse_invalid(profiles, names)
    for profile in profiles[1:]:
        _refuse_others(profiles[0], profile, other_networks=other_networks, other_hosts=other_hosts)
    every = [figures(profile) for profile in profiles]
    shared = [[key for key in every[0] if key in found and _alike(every[0][key], found[key])] for found in every[1:]]
    compared = sum(map(len, shared))
    rng = np.random.default_rng(seed)
    pairs = []
    for label, profile, found, keys in zip(names[1:], profiles[1:], every[1:], shared, strict=True):
        differences = tuple(
            _difference(
                key,
                every[0][key],
                found[key],
                tolerance=tolerance,
                confidence=1 - (1 - confidence) / compared,
                usual=profile.stream.latency.confidence,
                rng=rng,
            )
            for key in keys
        )
        machine = _reference_changes(profiles[0], profile)
        differences = tuple(_beyond_machine(each, machine, tolerance) for each in differences)
        differences = tuple(_borne_out(each, differences, tolerance) for each in differences)
        pairs.append(_pair(label, profiles[0], profile, differences, keys=(every[0], found)))
    return Comparison(
        baseline=names[0],
        pairs=tuple(pairs),
        tolerance=tolerance,
        confidence=confidence,
        compared=compared,
        worse=tuple(sentence for pair in pairs for sentence in _worse(pair, alone=len(pairs) == 1)),
    )


def _refuse_invalid(profiles: Sequence[Profile], names: Sequence[str]) -> None:
    for profile, name in zip(profiles, names, strict=True):
        broken = ", ".join(check.rule for check in profile.broken)
        why = [f"broke {broken}"] if broken else []
        why += [] if profile.complete else ["is incomplete"]
        if why:
            raise MeasurementError(
                f"'{name}' of {profile.created} {' and '.join(why)}; measure it again, or allow invalid profiles"
            )


def _refuse_others(first: Profile, other: Profile, *, other_networks: bool, other_hosts: bool) -> None:
    if other.plan != first.plan and not other_networks:
        raise MeasurementError(
            f"'{first.network}' (plan {first.plan[:12]}) and '{other.network}' (plan {other.plan[:12]}) are "
            "not the same network cut the same way; allow other networks to compare the exits of equal names"
        )
    differing = machine_changes(first, other)
    if differing and not other_hosts:
        raise MeasurementError(
            f"the profiles are not of one machine and runtime ({_listed(differing)}); compare what one machine "
            "measured, or allow other hosts"
        )


def _listed(differing: Sequence[Change]) -> str:
    return "; ".join(f"{change.name} '{change.baseline}' and '{change.other}'" for change in differing)


def _alike(mine: Figure, theirs: Figure) -> bool:
    """Whether two figures are of the same thing, and have a ratio."""
    return mine.comparable == theirs.comparable and mine.value > 0 and theirs.value > 0


def _difference(
    key: Key,
    mine: Figure,
    theirs: Figure,
    *,
    tolerance: float,
    confidence: float,
    usual: float,
    rng: np.random.Generator,
) -> Difference:
    change = theirs.value / mine.value - 1
    low, high = (end - 1 for end in ratio_interval(mine, theirs, confidence=confidence, usual=usual, rng=rng))
    verdict: Literal["worse", "better", "same", "unclear"] = "unclear"
    if low > tolerance:
        verdict = "worse"
    elif high < -tolerance:
        verdict = "better"
    elif -tolerance <= low and high <= tolerance:
        verdict = "same"
    known = mine.accuracy is not None and theirs.accuracy is not None
    return Difference(
        part=key[0],
        name=key[1],
        quantity=key[2],
        unit=mine.unit,
        baseline=mine.value,
        other=theirs.value,
        change=change,
        low=min(low, change),
        high=max(high, change),
        verdict=verdict,
        accuracy_change=(theirs.accuracy or 0.0) - (mine.accuracy or 0.0) if known else None,
    )


def _beyond_machine(each: Difference, machine: Mapping[str, float], tolerance: float) -> Difference:
    """The figure; a latency is unclear where the machine may have made the difference."""
    change = machine.get(each.quantity)
    if change is None or each.part == "paced" or each.verdict not in ("worse", "better"):
        return each
    own = each.low - FOLLOWS * max(change, 0) if each.verdict == "worse" else -each.high + FOLLOWS * min(change, 0)
    return each if own > tolerance else replace(each, verdict="unclear")


def _borne_out(each: Difference, every: Sequence[Difference], tolerance: float) -> Difference:
    """The figure; a relative one is unclear where the stage's own time did not change that way."""
    if each.quantity != "relative" or each.verdict not in ("worse", "better"):
        return each
    own = next(other.change for other in every if (other.name, other.quantity) == (each.name, "compute"))
    if (own if each.verdict == "worse" else -own) >= BORNE_OUT * tolerance:
        return each
    return replace(each, verdict="unclear")


def _pair(
    label: str,
    first: Profile,
    other: Profile,
    differences: tuple[Difference, ...],
    *,
    keys: tuple[dict[Key, Figure], dict[Key, Figure]],
) -> Pair:
    mine, theirs = keys
    machines = machine_changes(first, other)
    notes = [f"the machines differ: {_listed(machines)}"] if machines else []
    slower = _reference_changes(first, other).get("median")
    if slower is not None and abs(slower) >= FELT:
        direction = "longer" if slower > 0 else "less"
        notes.append(f"the reference work, which is none of the network's, took {percent(abs(slower))} {direction}")
    for profile in (first, other):
        if profile.broken:
            notes.append(f"{profile.created} is invalid: {', '.join(check.rule for check in profile.broken)}")
        if not profile.complete:
            notes.append(f"{profile.created} is incomplete")
    for part in dict.fromkeys(key[0] for key in (*mine, *theirs)):
        lonely = dict.fromkeys(
            key[1] for key in (*mine, *theirs) if key[0] == part and (key in mine) != (key in theirs)
        )
        if lonely:
            notes.append(f"only one of the profiles has all figures of {part} {', '.join(map(repr, lonely))}")
    other_meter = [key[1] for key in mine if key in theirs and mine[key].comparable != theirs[key].comparable]
    if other_meter:
        notes.append("energy is not compared: the meters or what they cover differ")
    if has_lone_windows(first) or has_lone_windows(other):
        notes.append("energy is not compared: fewer than three windows give no interval; use the protocol standard")
    notes += [f"'{item.network}' of {item.created}: {item.scripted}" for item in (first, other) if item.scripted]
    notes += [f"{item.created} was held to no rule: its schema has none" for item in (first, other) if not item.checks]
    return Pair(
        other=label,
        differences=differences,
        changes=changes(first, other),
        notes=tuple(notes),
        machines_differ=bool(machines),
        slower=slower,
    )


def _reference_changes(first: Profile, other: Profile) -> dict[str, float]:
    """What the reference took longer in the other, by quantity; nothing where work or machine are not the same."""
    libraries = [profile.before.versions.get("numpy") for profile in (first, other)]
    if machine_changes(first, other) or libraries[0] != libraries[1] or not (first.reference_ns and other.reference_ns):
        return {}
    before, after = (np.asarray(profile.reference_ns, dtype=np.float64) for profile in (first, other))
    return {name: float(of(after) / of(before)) - 1 for name, of in STATISTICS.items()} if before.min() > 0 else {}


def _worse(pair: Pair, *, alone: bool) -> list[str]:
    where = "" if alone else f"{pair.other}: "
    doubt = " (but the machines differ)" if pair.machines_differ else ""
    return [f"{where}{each.sentence}{doubt}" for each in pair.differences if each.verdict == "worse"]
