"""A profile as rows and columns: the one place that decides what a report says. Terminal, CSV and HTML show it.

Rows hold SI values; a :class:`Column` turns a row into text for people.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from edgekit.measured import Energy, Interval, LatencySummary
from edgekit.records import Profile
from edgekit.report.formats import NONE, Unit, energy_unit, fixed, minus, percent, plus_minus, ranged, si, time_unit

__all__ = [
    "STREAM",
    "Column",
    "Row",
    "columns",
    "energy_reasons",
    "gate_lines",
    "labels",
    "notes",
    "rows",
    "short_names",
    "signed",
]

STREAM = "stream"
"""Name of the row of the data run through the policy."""

_SHORT = 16
_P90_SAMPLES, _P99_SAMPLES = 64, 662


@dataclass(frozen=True, kw_only=True)
class Row:
    """One exit, or the stream.

    Attributes:
        name: of the exit, or :data:`STREAM`.
        short: the name where room is scarce.
        stream: whether it is the stream.
        share: of the stream's samples that left here.
        accuracy: on the data, every sample forced to leave here (for the stream: through the policy).
        share_accuracy: of the stream's samples that left here.
        macs: for one sample, with every gate open (for the stream: the mean of what ran).
        latency: summary of the raw samples.
        energy: of one inference.
        device: summary by the device's own clock; ``None`` where it has none.
        added_s: median latency that this exit costs more than the one before.
        added_j: gross energy likewise.
    """

    name: str
    short: str
    stream: bool
    share: float | None
    accuracy: float | None
    share_accuracy: float | None
    macs: float | None
    latency: LatencySummary
    energy: Energy
    device: LatencySummary | None = None
    added_s: Interval | None = None
    added_j: Interval | None = None


@dataclass(frozen=True)
class Column:
    """One column for people.

    Attributes:
        title: its heading, with the unit in brackets.
        help: what it means, in a sentence.
        text: a row's figure as text.
        value: what rows are sorted by, in SI units; ``None`` goes last.
        detail: shown only where there is room.
        under: an interval, which may be shown below the figure of the column before.
    """

    title: str
    help: str
    text: Callable[[Row], str]
    value: Callable[[Row], float | None]
    detail: bool = False
    under: bool = False


def rows(profile: Profile) -> tuple[Row, ...]:
    """Every exit in order, then the stream."""
    exits = [
        Row(
            name=item.name,
            short=short,
            stream=False,
            share=item.share,
            accuracy=item.accuracy,
            share_accuracy=item.share_accuracy,
            macs=item.macs,
            latency=item.latency,
            energy=item.energy,
            device=item.device,
            added_s=item.added_s,
            added_j=item.added_j,
        )
        for item, short in zip(profile.exits, short_names([item.name for item in profile.exits]), strict=True)
    ]
    stream = profile.stream
    whole = Row(
        name=STREAM,
        short=STREAM,
        stream=True,
        share=1.0,
        accuracy=stream.accuracy,
        share_accuracy=stream.accuracy,
        macs=_mean_macs(profile),
        latency=stream.latency,
        energy=stream.energy,
        device=stream.device,
    )
    return (*exits, whole)


def short_names(names: Sequence[str], *, most: int = _SHORT) -> tuple[str, ...]:
    """Names of at most ``most`` characters, still told apart: long ones lose what they share, then their middle."""
    if not names or max(map(len, names)) <= most:
        return tuple(names)
    start = _shared(names)
    rests = [name[start:] for name in names]
    end = _shared([rest[::-1] for rest in rests])
    cut = [f"{'…' if start else ''}{rest[: len(rest) - end]}{'…' if end else ''}" for rest in rests]
    half = (most - 1) // 2
    short = [name if len(name) <= most else f"{name[:half]}…{name[-half:]}" for name in cut]
    return tuple(short) if len(set(short)) == len(short) else tuple(f"#{place}" for place in range(1, len(names) + 1))


def _shared(names: Sequence[str]) -> int:
    """Letters that two names or more begin with, up to a separator, so that "layer1" and "layer10" stay whole."""
    if len(names) < 2:
        return 0
    letters = takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    return len("".join(column[0] for column in letters).rstrip(string.ascii_letters + string.digits))


def _mean_macs(profile: Profile) -> float | None:
    if profile.stream.macs is not None:
        return profile.stream.macs
    counts = [profile.exits[index].macs for index in profile.stream.exits]
    known = [count for count in counts if count is not None]
    return sum(known) / len(known) if known and len(known) == len(counts) else None


def columns(profiles: Sequence[Profile]) -> tuple[Column, ...]:
    """The per-exit table's columns, in units that suit all of ``profiles``; none of what no row has a figure for."""
    every = [row for profile in profiles for row in rows(profile)]
    time = time_unit(row.latency.median_s for row in every)
    confidence = percent(every[0].latency.confidence, digits=0)
    places = {row.name: place for place, row in enumerate(every)}
    found = [
        Column(
            "exit",
            "Where a sample leaves; the stream runs the data through the policy.",
            lambda row: row.name,
            lambda row: places[row.name],
        ),
        _share("share", "Share of the stream's samples that left here.", lambda row: row.share),
        _share("accuracy", "On all samples of the data, each forced to leave here.", lambda row: row.accuracy),
        _share("of leavers", "Accuracy of the samples that left here.", lambda row: row.share_accuracy, detail=True),
        Column("MACs", _macs_help(profiles), lambda row: si(row.macs), lambda row: row.macs),
        *_latency_columns(every, time, confidence),
        *_energy_columns(every, confidence),
        Column(
            "samples",
            "Timed inferences.",
            lambda row: str(row.latency.samples),
            lambda row: row.latency.samples,
            detail=True,
        ),
        Column(
            "outliers",
            "Beyond Tukey's 3 IQR fences; kept.",
            lambda row: str(row.latency.outliers),
            lambda row: row.latency.outliers,
            detail=True,
        ),
    ]
    return tuple(found)


def _share(title: str, meaning: str, value: Callable[[Row], float | None], *, detail: bool = False) -> Column:
    return Column(title, meaning, lambda row: percent(value(row)), value, detail)


def _latency_columns(every: Sequence[Row], time: Unit, confidence: str) -> Iterator[Column]:
    def figure(title: str, meaning: str, value: Callable[[Row], float | None], *, detail: bool = False) -> Column:
        return Column(title, meaning, lambda row: fixed(value(row), time), value, detail)

    yield figure(f"median [{time.symbol}]", "Middle of the latencies.", lambda row: row.latency.median_s)
    yield Column(
        f"{confidence} CI",
        "Interval of the median.",
        lambda row: ranged(row.latency.median_low_s, row.latency.median_high_s, time),
        lambda row: row.latency.median_high_s - row.latency.median_low_s,
        under=True,
    )
    mean = "Arithmetic mean: what a long stream pays."
    yield figure(f"mean [{time.symbol}]", mean, lambda row: row.latency.mean_s, detail=True)
    yield figure("p90", "90 % take no longer.", lambda row: row.latency.p90_s)
    if any(row.latency.p90_low_s is not None for row in every):
        yield Column(
            "p90 CI",
            f"{confidence} interval of the 90th percentile.",
            lambda row: ranged(row.latency.p90_low_s, row.latency.p90_high_s, time),
            lambda row: row.latency.p90_high_s,
            detail=True,
            under=True,
        )
    yield figure("p99", "99 % take no longer.", lambda row: row.latency.p99_s)
    if any(row.added_s is not None for row in every):
        meaning = "What this exit's stages add to the median of the exit before, with its interval."
        yield from _added(f"added [{time.symbol}]", meaning, lambda row: row.added_s, time)
    if any(row.device is not None for row in every):
        meaning = "Median by the device's own clock."
        yield figure("on the device", meaning, lambda row: row.device.median_s if row.device else None, detail=True)


def _energy_columns(every: Sequence[Row], confidence: str) -> Iterator[Column]:
    if all(row.energy.gross_j is None for row in every):
        return
    joule = energy_unit(row.energy.gross_j for row in every)
    yield Column(
        f"energy [{joule.symbol}]",
        f"Gross energy of one inference; ± is half its {confidence} interval.",
        lambda row: (
            "unavailable"
            if row.energy.gross_j is None
            else plus_minus(row.energy.gross_j, row.energy.low_j, row.energy.high_j, joule)
        ),
        lambda row: row.energy.gross_j,
    )
    yield Column(
        f"net [{joule.symbol}]",
        "Gross less idle power times latency.",
        lambda row: plus_minus(row.energy.net_j, row.energy.net_low_j, row.energy.net_high_j, joule),
        lambda row: row.energy.net_j,
        detail=True,
    )
    if any(row.added_j is not None for row in every):
        meaning = "What this exit's stages add to the gross energy of the exit before, with its interval."
        yield from _added(f"added [{joule.symbol}]", meaning, lambda row: row.added_j, joule)


def _added(title: str, meaning: str, value: Callable[[Row], Interval | None], unit: Unit) -> Iterator[Column]:
    def number(row: Row) -> float | None:
        found = value(row)
        return None if found is None else found.value

    def ends(row: Row) -> str:
        found = value(row)
        return NONE if found is None else ranged(found.low, found.high, unit) + _sign(found)

    yield Column(title, meaning, lambda row: minus(fixed(number(row), unit)), number, detail=True)
    yield Column(f"{title} CI", "Its interval.", ends, number, detail=True, under=True)


def _sign(found: Interval) -> str:
    return ", spans zero" if found.spans_zero else ""


def signed(found: Interval | None, unit: Unit) -> str:
    """A difference with its interval, saying so where its sign is not known: ``0.700 (0.650–0.750)``."""
    if found is None:
        return NONE
    return f"{minus(fixed(found.value, unit))} ({ranged(found.low, found.high, unit)}{_sign(found)})"


def _macs_help(profiles: Sequence[Profile]) -> str:
    gated = any(profile.gates for profile in profiles)
    more = " Of an exit with every gate open; of the stream the mean of what ran." if gated else ""
    return f"Multiply-accumulates for one sample.{more}"


def gate_lines(profile: Profile) -> tuple[tuple[str, str, str], ...]:
    """Every gate: its name, the share of the rows that came to it for which it was open, and how many came."""
    return tuple(
        (gate.name, percent(gate.share), NONE if gate.reached is None else str(gate.reached)) for gate in profile.gates
    )


def energy_reasons(profile: Profile) -> tuple[str, ...]:
    """Why energy figures are missing, each reason once: ``energy unavailable: reason``."""
    lacking: dict[str, list[str]] = {}
    every = rows(profile)
    for row in every:
        if row.energy.gross_j is None:
            lacking.setdefault(row.energy.reason or "the profile does not say why", []).append(row.name)
    return tuple(
        f"energy unavailable{'' if len(names) == len(every) else ' for ' + ', '.join(names)}: {reason}"
        for reason, names in lacking.items()
    )


def notes(profile: Profile) -> tuple[str, ...]:
    """Why figures of the per-exit table are missing; of energy, :func:`energy_reasons` says it."""
    every = rows(profile)
    found = []
    if all(row.accuracy is None for row in every):
        found.append("accuracy unavailable: the data has no labels")
    for name, need, missing in (
        ("p90", _P90_SAMPLES, [row for row in every if row.latency.p90_s is None]),
        ("p99", _P99_SAMPLES, [row for row in every if row.latency.p99_s is None]),
    ):
        if missing:
            fewest = min(row.latency.samples for row in missing)
            found.append(f"{name} {NONE}: needs {need} samples; the shortest row has {fewest}")
    return tuple(found)


def labels(profiles: Sequence[Profile]) -> tuple[str, ...]:
    """A short name for each profile, told apart by what differs: network, runtime, policy, and at last a number."""
    parts = [(item.network, str(item.runtime.get("name", "")), str(item.policy.get("name", ""))) for item in profiles]
    differing = [index for index in (1, 2) if len({part[index] for part in parts}) > 1]
    found = [" · ".join([part[0], *(part[index] for index in differing)]) for part in parts]
    if len(set(found)) == len(found):
        return tuple(found)
    return tuple(f"{label} #{number}" for number, label in enumerate(found, start=1))
