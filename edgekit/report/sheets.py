"""What a profile holds beside its exits, each as one table: stages, operators, paths of gates, paced streams.

Texts for people, and beside each the value in SI units that it is sorted by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgekit.measured import Interval
from edgekit.records import PacedProfile, PathProfile, Profile
from edgekit.report.formats import NONE, Unit, duration, energy_unit, fixed, percent, plus_minus, ranged, si
from edgekit.report.formats import time_unit as fitting
from edgekit.report.tables import signed

__all__ = [
    "Cell",
    "Sheet",
    "operator_sheet",
    "paced_sheet",
    "path_sheet",
    "rate_text",
    "sheets",
    "stage_sheet",
    "window_sheet",
]


@dataclass(frozen=True)
class Cell:
    """A text, and what its column is sorted by; ``None`` goes last."""

    text: str
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One table.

    Attributes:
        key: of the part, as in the profile.
        title: of the table.
        lead: how to read it, in a sentence.
        headings: with units in brackets.
        lines: cells of every line; the first names it.
        details: places of columns that a narrow terminal goes without, first to go first.
    """

    key: str
    title: str
    lead: str
    headings: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]
    details: tuple[int, ...] = ()

    def without(self, places: Sequence[int]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
        """Headings and texts of the other columns."""
        kept = [place for place in range(len(self.headings)) if place not in places]
        lines = tuple(tuple(line[place].text for place in kept) for line in self.lines)
        return tuple(self.headings[place] for place in kept), lines


def stage_sheet(profile: Profile) -> Sheet | None:
    """Where the time goes, stage by stage; ``None`` where that was not measured."""
    if not profile.stages:
        return None
    unit = fitting(stage.compute.value for stage in profile.stages)

    def cells(found: Interval | None) -> tuple[Cell, Cell]:
        if found is None:
            return Cell(NONE), Cell(NONE)
        spread = plus_minus(found.value, found.low, found.high, unit)
        known = f"{spread}, spans zero" if found.spans_zero else spread
        return Cell(known, found.value), Cell(ranged(found.low, found.high, unit), found.high - found.low)

    lines = []
    for place, stage in enumerate(profile.stages):
        compute, compute_ci = cells(stage.compute)
        lines.append(
            (
                Cell(stage.name, place),
                Cell(percent(stage.share), stage.share),
                compute,
                compute_ci,
                cells(stage.head)[0],
                cells(stage.decision)[0],
                cells(stage.boundary)[0],
            )
        )
    heads = ("stage", "share", f"compute [{unit.symbol}]", "compute CI", "of it head", "decision", "boundary")
    return Sheet(
        key="stages",
        title="Where the time goes",
        lead="Medians over traced inferences; ± is half the interval. Compute holds the head and its score; boundary "
        "is what lies between one stage and the next: copies and calls.",
        headings=heads,
        lines=tuple(lines),
        details=(3, 1, 6, 5),
    )


def operator_sheet(profile: Profile) -> Sheet | None:
    """Every operator by the runtime's own profiler, stage by stage; ``None`` where that was not asked for."""
    if not profile.operators:
        return None
    unit = fitting(operator.mean_s for operator in profile.operators)
    places = {name: place for place, name in enumerate(dict.fromkeys(item.stage for item in profile.operators))}
    lines = tuple(
        (
            Cell(item.stage, places[item.stage]),
            Cell(item.name, place),
            Cell(item.kind),
            Cell(fixed(item.mean_s, unit), item.mean_s),
            Cell(percent(item.share), item.share),
            Cell(str(item.calls), item.calls),
        )
        for place, item in enumerate(profile.operators)
    )
    return Sheet(
        key="operators",
        title="Operators",
        lead="Means by the runtime's own profiler, which slows it: shares are worth more than times here.",
        headings=("stage", "operator", "kind", f"mean [{unit.symbol}]", "of the stage", "calls"),
        lines=lines,
    )


def path_sheet(profile: Profile) -> Sheet | None:
    """What closing each gate saves; ``None`` for a network without gates."""
    if not profile.paths:
        return None
    unit = fitting(path.latency.median_s for path in profile.paths)
    joule = energy_unit(path.energy.gross_j for path in profile.paths)
    measured = any(path.energy.gross_j is not None for path in profile.paths)
    heads = ("path", f"median [{unit.symbol}]", "CI", "p90", f"closing it saves [{unit.symbol}]", "MACs")
    return Sheet(
        key="paths",
        title="What closing each gate saves",
        lead="Every sample forced through the gates to the last exit; saved is against all gates open, with interval.",
        headings=(*heads, f"energy [{joule.symbol}]") if measured else heads,
        lines=tuple(
            (*_path_cells(path, place, unit), *([_energy_cell(path, joule)] if measured else ()))
            for place, path in enumerate(profile.paths)
        ),
        details=(5, 2, 3, 1),
    )


def _path_cells(path: PathProfile, place: int, unit: Unit) -> Iterator[Cell]:
    latency = path.latency
    yield Cell(path.name, place)
    yield Cell(fixed(latency.median_s, unit), latency.median_s)
    yield Cell(ranged(latency.median_low_s, latency.median_high_s, unit), latency.median_high_s - latency.median_low_s)
    yield Cell(fixed(latency.p90_s, unit), latency.p90_s)
    yield Cell(signed(path.saved_s, unit), path.saved_s.value if path.saved_s else None)
    yield Cell(si(path.macs), path.macs)


def _energy_cell(part: PathProfile | PacedProfile, unit: Unit) -> Cell:
    spent = part.energy
    return Cell(plus_minus(spent.gross_j, spent.low_j, spent.high_j, unit), spent.gross_j)


def paced_sheet(profile: Profile) -> Sheet | None:
    """The stream at fixed rates against back to back; ``None`` where that was not measured."""
    if not profile.paced:
        return None
    unit = fitting([profile.stream.latency.mean_s, *(item.latency.mean_s for item in profile.paced)])
    joule = energy_unit([profile.stream.energy.gross_j, *(item.energy.gross_j for item in profile.paced)])
    measured = any(item.energy.gross_j is not None for item in profile.paced)
    base = profile.stream.latency

    def cells(name: str, place: float, item: PacedProfile | None) -> Iterator[Cell]:
        latency = base if item is None else item.latency
        spent = (profile.stream if item is None else item).energy
        yield Cell(name, place)
        yield Cell(fixed(latency.mean_s, unit), latency.mean_s)
        yield Cell(ranged(latency.mean_low_s, latency.mean_high_s, unit), latency.mean_high_s - latency.mean_low_s)
        ratio = latency.mean_s / base.mean_s
        yield Cell(f"{ratio:.3f}×", ratio)
        yield Cell(fixed(latency.median_s, unit), latency.median_s)
        yield Cell(fixed(latency.p90_s, unit), latency.p90_s)
        yield Cell(fixed(latency.p99_s, unit), latency.p99_s)
        yield Cell(NONE if item is None else f"{item.late} of {latency.samples}", 0 if item is None else item.late)
        if measured:
            yield Cell(plus_minus(spent.gross_j, spent.low_j, spent.high_j, joule), spent.gross_j)

    heads = ("stream", f"mean [{unit.symbol}]", "CI", "against", "median", "p90", "p99", "begun late")
    lines = [tuple(cells("back to back", 0.0, None))]
    lines += [tuple(cells(rate_text(item.rate_hz), item.rate_hz, item)) for item in profile.paced]
    idling = " Energy at a rate holds the idling up to the next inference." if measured else ""
    return Sheet(
        key="paced",
        title="At a fixed rate",
        lead="The stream as from a camera: idle between inferences, so clocks may drop and caches cool. Against is the "
        f"mean over that of back to back.{idling}",
        headings=(*heads, f"energy [{joule.symbol}]") if measured else heads,
        lines=tuple(lines),
        details=(2, 6, 7, 4),
    )


def window_sheet(profile: Profile) -> Sheet | None:
    """Every window of energy as it was taken; ``None`` where there are none."""
    if not profile.windows:
        return None
    lines = []
    for place, window in enumerate(profile.windows):
        long_s = window.stop_s - window.start_s
        lines.append(
            (
                Cell(window.name, place),
                Cell(window.kind),
                Cell(f"{window.start_s:.1f}", window.start_s),
                Cell(f"{long_s:.2f}", long_s),
                Cell(str(window.inferences), window.inferences),
                Cell(f"{window.energy_j:.4g} ±{window.bound_j:.2g}", window.energy_j),
                Cell(f"{window.energy_j / long_s:.3f}", window.energy_j / long_s),
                Cell(str(window.updates), window.updates),
                Cell(duration(window.median_s), window.median_s),
            )
        )
    return Sheet(
        key="windows",
        title="Windows",
        lead="In the order in which they were taken; ± is what the sensor leaves open.",
        headings=(
            "window", "kind", "from [s]", "length [s]", "inferences", "energy [J]", "power [W]", "updates",
            "median latency",
        ),
        lines=tuple(lines),
    )  # fmt: skip


def rate_text(rate_hz: float) -> str:
    """``at 10 Hz``."""
    return f"at {rate_hz:g} Hz"


def sheets(profile: Profile) -> tuple[Sheet, ...]:
    """Every table that there is, without the operators'."""
    every: Sequence[Sheet | None] = (stage_sheet(profile), path_sheet(profile), paced_sheet(profile))
    return tuple(sheet for sheet in every if sheet is not None)
