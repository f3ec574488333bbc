"""Two or more profiles held against the first: latency with its uncertainty, and what else differs between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MeasurementError
from edgekit.records import Profile
from edgekit.report.formats import NONE, percent, points
from edgekit.report.tables import STREAM, labels

__all__ = ["Change", "Comparison", "Difference", "Pair", "compare"]

CAVEAT = (
    "Intervals cover the scatter of the samples within each run, not what changes from run to run; "
    "measure both again before trusting a small difference."
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Median latency of one exit, or of the stream, in two profiles.

    Attributes:
        name: of the exit, or ``"stream"``.
        baseline_s: median in the first profile.
        other_s: median in the other.
        change: ``other_s / baseline_s - 1``.
        low: lower end of its bootstrap interval.
        high: upper end.
        confidence: of the interval.
        accuracy_change: of the accuracies, where both have labels.
    """

    name: str
    baseline_s: float
    other_s: float
    change: float
    low: float
    high: float
    confidence: float
    accuracy_change: float | None

    @property
    def verdict(self) -> str:
        """``"slower"``, ``"faster"``, or ``"no clear difference"`` when the interval holds 0."""
        return "slower" if self.low > 0 else "faster" if self.high < 0 else "no clear difference"

    @property
    def text(self) -> str:
        """``slower by 6.0 % (95 % CI 4.1..8.2 %)``."""
        ends = (-self.high, -self.low) if self.verdict == "faster" else (self.low, self.high)
        interval = f"({percent(self.confidence, digits=0)} CI {100 * ends[0]:.1f}..{100 * ends[1]:.1f} %)"
        by = "" if self.verdict == "no clear difference" else f" by {percent(abs(self.change))}"
        return f"{self.verdict}{by} {interval}"

    @property
    def accuracy_text(self) -> str:
        """``−0.7 points``."""
        return NONE if self.accuracy_change is None else points(self.accuracy_change)


@dataclass(frozen=True)
class Change:
    """Something that is not the same in two profiles."""

    name: str
    baseline: str
    other: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One profile held against the first.

    Attributes:
        other: its label.
        differences: exits in order, then the stream.
        changes: of machine, runtime, network, policy, data and protocol.
        notes: what could not be compared.
    """

    other: str
    differences: tuple[Difference, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Profiles held against the first of them.

    Attributes:
        baseline: label of the first.
        pairs: one for each other profile.
        caveat: what the intervals do not cover.
    """

    baseline: str
    pairs: tuple[Pair, ...]
    caveat: str = CAVEAT


def compare(
    profiles: Sequence[Profile],
    *,
    other_networks: bool = False,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Hold profiles against the first of them.

    Args:
        profiles: two or more.
        other_networks: compare although the plans differ; exits are then matched by name.
        confidence: of the bootstrap intervals (percentile method).
        resamples: bootstrap resamples.
        seed: of the resampling; the same seed gives the same intervals.

    Raises:
        MeasurementError: fewer than two profiles, profiles of different plans, or a row without samples.
    """
    if len(profiles) < 2:
        raise MeasurementError(f"a comparison needs two profiles or more, not {len(profiles)}")
    first, names = profiles[0], labels(profiles)
    for profile in profiles[1:]:
        if profile.plan != first.plan and not other_networks:
            raise MeasurementError(
                f"'{first.network}' (plan {first.plan[:12]}) and '{profile.network}' (plan {profile.plan[:12]}) are "
                "not the same network cut the same way; allow other networks to compare the exits of equal names"
            )
    random = np.random.default_rng(seed)
    pairs = []
    for label, profile in zip(names[1:], profiles[1:], strict=True):
        mine, theirs = _measured(first), _measured(profile)
        differences = tuple(
            _difference(name, mine[name], theirs[name], confidence=confidence, resamples=resamples, random=random)
            for name in mine
            if name in theirs
        )
        pairs.append(
            Pair(other=label, differences=differences, changes=_changes(first, profile), notes=_notes(first, profile))
        )
    return Comparison(baseline=names[0], pairs=tuple(pairs))


_Measured = tuple[tuple[int, ...], "float | None"]
"""Raw latencies in nanoseconds, and accuracy."""


def _measured(profile: Profile) -> dict[str, _Measured]:
    exits = {f"exit {item.name}" if item.name == STREAM else item.name: item for item in profile.exits}
    return {name: (item.latency_ns, item.accuracy) for name, item in (exits | {STREAM: profile.stream}).items()}


def _difference(
    name: str, mine: _Measured, theirs: _Measured, *, confidence: float, resamples: int, random: np.random.Generator
) -> Difference:
    (mine_ns, mine_accuracy), (theirs_ns, theirs_accuracy) = mine, theirs
    if not mine_ns or not theirs_ns:
        raise MeasurementError(f"'{name}' has no raw samples in one of the profiles; measure it again")
    baseline, other = np.sort(np.asarray(mine_ns, float)), np.sort(np.asarray(theirs_ns, float))
    ratios = _medians(other, resamples, random) / _medians(baseline, resamples, random) - 1
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    change = float(np.median(other) / np.median(baseline) - 1)
    both = None if mine_accuracy is None or theirs_accuracy is None else theirs_accuracy - mine_accuracy
    return Difference(
        name=name,
        baseline_s=float(np.median(baseline)) / 1e9,
        other_s=float(np.median(other)) / 1e9,
        change=change,
        low=float(low),
        high=float(high),
        confidence=confidence,
        accuracy_change=both,
    )


def _medians(ordered: NDArray[np.float64], resamples: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Medians of ``resamples`` bootstrap resamples of sorted values ``(n,) float64``, as ``(resamples,) float64``.

    Drawn without resampling: a resample picks n uniform positions, and its k-th smallest value lies at the k-th
    smallest position, which is Beta(k, n + 1 - k) distributed; given that, the one below it is its product with the
    largest of k - 1 uniforms (David and Nagaraja, Order Statistics, 2003, sections 2.3 and 2.5).
    """
    count = len(ordered)
    upper = count // 2 + 1
    high = random.beta(upper, count + 1 - upper, resamples)
    low = high * random.random(resamples) ** (1 / (upper - 1)) if count % 2 == 0 else high
    places = np.minimum((np.stack([low, high]) * count).astype(np.intp), count - 1)
    medians: NDArray[np.float64] = ordered[places].mean(axis=0)
    return medians


def _notes(first: Profile, other: Profile) -> tuple[str, ...]:
    mine, theirs = _measured(first), _measured(other)
    lonely = [name for name in (*mine, *theirs) if (name in mine) != (name in theirs)]
    found = [f"only one of the networks has exit {', '.join(repr(name) for name in lonely)}"] if lonely else []
    found += [f"'{item.network}' of {item.created}: {item.scripted}" for item in (first, other) if item.scripted]
    return tuple(found)


_VOLATILE = {"taken", "load", "busy", "frequencies_hz", "temperatures_c", "unavailable", "created"}
"""What differs between any two runs."""


def _changes(first: Profile, other: Profile) -> tuple[Change, ...]:
    mine, theirs = dict(_conditions(first)), dict(_conditions(other))
    return tuple(
        Change(name, mine.get(name, NONE), theirs.get(name, NONE))
        for name in dict.fromkeys((*mine, *theirs))
        if mine.get(name) != theirs.get(name)
    )


def _conditions(profile: Profile) -> Iterator[tuple[str, str]]:
    """Everything that a fair comparison holds constant, flat."""
    yield from _flat("network", {"name": profile.network, "plan": profile.plan[:12]})
    yield from _flat("stage", {name: digest[:12] for name, digest in profile.artifacts.items()})
    yield from _flat("runtime", profile.runtime)
    yield from _flat("policy", {name: value for name, value in profile.policy.items() if name != "provenance"})
    provenance = profile.policy.get("provenance") or {}
    yield from _flat("calibration", {name: provenance.get(name) for name in ("method", "data_sha256", "settings")})
    yield from _flat("data", {"source": profile.data, "sha256": profile.data_sha256[:12], "samples": profile.samples})
    yield from _flat("protocol", profile.settings)
    yield from _flat("machine", msgspec.to_builtins(profile.before))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _VOLATILE:
                yield from _flat(f"{prefix} {name}", item)
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(map(_text, value))
    elif value is not None:
        yield prefix, _text(value)


def _text(value: Any) -> str:
    # JSON has no infinity: a threshold that nobody passes is read back as null. Seven digits are those of a float32.
    if value is None or value == math.inf:
        return "never"
    return f"{value:.7g}" if isinstance(value, float) else str(value)
