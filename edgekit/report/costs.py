"""Accuracy against what an inference costs: exits, stream and rates, with the front of those that nothing beats."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from edgekit.measured import Energy, LatencySummary
from edgekit.records import Profile
from edgekit.report.charts import FAINT, QUIET, STREAM_COLOUR, Figure, exit_colours
from edgekit.report.formats import Unit, duration, energy, energy_unit, percent, si, time_unit
from edgekit.report.sheets import rate_text
from edgekit.report.tables import STREAM, labels, rows

__all__ = ["Point", "cost_figures", "front"]

PROFILE_COLOURS = ("#3b82f6", "#f43f5e", "#10b981", "#a855f7", "#06b6d4", "#84cc16", "#ec4899", "#78716c")
FRONT = "front"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One thing that can be done with a sample: leave at an exit, or follow the policy.

    Attributes:
        name: of the exit, ``"stream"``, or ``"stream at 10 Hz"``.
        short: where room is scarce.
        kind: ``"exit"``, ``"stream"`` or ``"paced"``.
        accuracy: on the data; at a rate, that of the stream, which answers the same.
        share: of the stream that left there.
        latency: of one inference.
        energy: likewise.
        macs: likewise.
    """

    name: str
    short: str
    kind: str
    accuracy: float | None
    share: float | None
    latency: LatencySummary
    energy: Energy
    macs: float | None


_Ends = tuple["float | None", "float | None", "float | None"]


@dataclass(frozen=True)
class _Cost:
    """A cost: its name for people, and value with the ends of its interval."""

    title: str
    of: Callable[[Point], _Ends]
    unit: Callable[[Sequence[float]], Unit]
    text: Callable[[float], str]


COSTS = {
    "mean": _Cost(
        "mean latency",
        lambda point: (point.latency.mean_s, point.latency.mean_low_s, point.latency.mean_high_s),
        time_unit,
        duration,
    ),
    "median": _Cost(
        "median latency",
        lambda point: (point.latency.median_s, point.latency.median_low_s, point.latency.median_high_s),
        time_unit,
        duration,
    ),
    "p90": _Cost(
        "p90 latency",
        lambda point: (point.latency.p90_s, point.latency.p90_low_s, point.latency.p90_high_s),
        time_unit,
        duration,
    ),
    "gross": _Cost(
        "gross energy",
        # At a rate it holds the idling between inferences: no figure to put beside the others.
        lambda point: (
            (None, None, None)
            if point.kind == "paced"
            else (point.energy.gross_j, point.energy.low_j, point.energy.high_j)
        ),
        energy_unit,
        energy,
    ),
    "net": _Cost(
        "net energy",
        lambda point: (point.energy.net_j, point.energy.net_low_j, point.energy.net_high_j),
        energy_unit,
        energy,
    ),
    "macs": _Cost("MACs", lambda point: (point.macs, None, None), lambda _: Unit(1.0, ""), si),
}
"""What can be asked of an inference, by the name that the page chooses it by."""


def points(profile: Profile) -> tuple[Point, ...]:
    """Exits in order, then the stream, then the stream at its rates."""
    found = [
        Point(
            name=row.name,
            short=row.short,
            kind="stream" if row.stream else "exit",
            accuracy=row.accuracy,
            share=None if row.stream else row.share,
            latency=row.latency,
            energy=row.energy,
            macs=row.macs,
        )
        for row in rows(profile)
    ]
    stream = found[-1]
    for paced in profile.paced:
        name = f"{STREAM} {rate_text(paced.rate_hz)}"
        found.append(
            Point(
                name=name,
                short=rate_text(paced.rate_hz),
                kind="paced",
                accuracy=stream.accuracy,
                share=None,
                latency=paced.latency,
                energy=paced.energy,
                macs=stream.macs,
            )
        )
    return tuple(found)


def front(places: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Which of ``(cost, accuracy)`` no other beats: none is as accurate for less, or better for as little.

    Returns:
        Positions, from the cheapest on; accuracy rises along them.
    """
    found: list[int] = []
    for place in sorted(range(len(places)), key=lambda place: (places[place][0], -places[place][1])):
        if not found or places[place][1] > places[found[-1]][1]:
            found.append(place)
    return tuple(found)


def cost_figures(profiles: Sequence[Profile]) -> Figure:
    """A figure for every cost that some row has, as ``choices``; each ``says`` in words what is on the front.

    Where the data has no labels, every row takes a line of its own instead of an accuracy, and there is no front.
    """
    every = [points(profile) for profile in profiles]
    labelled = all(point.accuracy is not None for some in every for point in some)
    names = labels(profiles)
    return {
        "choices": {
            key: _figure(cost, profiles, every, names, labelled=labelled)
            for key, cost in COSTS.items()
            if any(cost.of(point)[0] is not None for some in every for point in some)
        },
        "titles": {key: cost.title for key, cost in COSTS.items()},
    }


def _figure(
    cost: _Cost,
    profiles: Sequence[Profile],
    every: Sequence[Sequence[Point]],
    names: Sequence[str],
    *,
    labelled: bool,
) -> Figure:
    known = [[point for point in some if cost.of(point)[0] is not None] for some in every]
    unit = cost.unit([cost.of(point)[0] or 0.0 for some in known for point in some])
    traces: list[Figure] = []
    for number, (profile, some, label) in enumerate(zip(profiles, known, names, strict=True)):
        colour = None if len(profiles) == 1 else PROFILE_COLOURS[number % len(PROFILE_COLOURS)]
        prefix = "" if colour is None else f"{label}: "
        for kind, style in _styles(profile, colour).items():
            chosen = [point for point in some if point.kind == kind]
            if chosen:
                drawn = _scatter(chosen, cost, unit, profile.samples, labelled=labelled)
                traces.append(drawn | style | {"name": html.escape(f"{prefix}{style['name']}")})
                if number:
                    traces[-1]["mode"] = style["mode"].replace("+text", "")
    says = f"Cost: {cost.title}."
    if labelled:
        flat = [point for some in known for point in some]
        places = [(cost.of(point)[0] or 0.0, point.accuracy or 0.0) for point in flat]
        best = front(places)
        traces.insert(0, _front([places[place] for place in best], unit))
        says += f" Nothing is as accurate for less than: {', '.join(flat[place].name for place in best)}."
    bracket = f" [{unit.symbol}]" if unit.symbol else ""
    layout: Figure = {
        "xaxis": {"title": {"text": f"{cost.title} of one inference{bracket}"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "accuracy"}, "tickformat": ".0%"} if labelled else {"autorange": "reversed"},
        "hovermode": "closest",
    }
    return {"data": traces, "layout": layout, "says": says}


def _styles(profile: Profile, colour: str | None) -> dict[str, Figure]:
    exits = list(exit_colours(len(profile.exits)))
    return {
        "exit": {
            "name": "exits" if colour else "forced exits",
            "mode": "lines+markers+text",
            "line": {"color": colour or QUIET, "width": 1.5, "dash": "dot"},
            "marker": {"color": colour or exits, "size": 11},
            "textposition": "bottom right",
        },
        "stream": {
            "name": "stream" if colour else "stream with the policy",
            "mode": "markers" if colour else "markers+text",
            "marker": {"color": colour or STREAM_COLOUR, "size": 18, "symbol": "star", "line": {"width": 1}},
            "textposition": "top left",
        },
        "paced": {
            "name": "stream at a fixed rate",
            # Without names: they lie close to the stream and to each other.
            "mode": "markers",
            "marker": {"color": colour or STREAM_COLOUR, "size": 11, "symbol": "diamond-open", "line": {"width": 2}},
        },
    }


def _front(places: Sequence[tuple[float, float]], unit: Unit) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "meta": FRONT,
        "x": [cost / unit.scale for cost, _ in places],
        "y": [accuracy for _, accuracy in places],
        "line": {"color": "#3b82f6", "width": 3, "shape": "hv"},
        "opacity": 0.6,
        "hoverinfo": "skip",
    }


def _scatter(some: Sequence[Point], cost: _Cost, unit: Unit, samples: int, *, labelled: bool) -> Figure:
    names = [html.escape(point.short) for point in some]
    ends = [cost.of(point) for point in some]
    error = {"type": "data", "symmetric": False, "color": FAINT, "thickness": 1.2, "width": 4}
    values = [value or 0.0 for value, _, _ in ends]
    figure: Figure = {
        "type": "scatter",
        "x": [value / unit.scale for value in values],
        "y": [point.accuracy for point in some] if labelled else names,
        "text": names if labelled else None,
        "cliponaxis": False,
        "hoverinfo": "text",
        "hovertext": ["<br>".join(_hover(point, cost, samples)) for point in some],
        "error_x": error
        | {
            "array": [
                ((value if high is None else high) - value) / unit.scale
                for value, (_, _, high) in zip(values, ends, strict=True)
            ],
            "arrayminus": [
                (value - (value if low is None else low)) / unit.scale
                for value, (_, low, _) in zip(values, ends, strict=True)
            ],
        },
    }
    if labelled:
        shares = [point.accuracy or 0.0 for point in some]
        bands = [wilson(share, samples, some[0].latency.confidence) for share in shares]
        figure["error_y"] = error | {
            "array": [high - share for share, (_, high) in zip(shares, bands, strict=True)],
            "arrayminus": [share - low for share, (low, _) in zip(shares, bands, strict=True)],
        }
    return figure


def _hover(point: Point, cost: _Cost, samples: int) -> Iterator[str]:
    confidence = percent(point.latency.confidence, digits=0)
    value, low, high = cost.of(point)
    ends = "" if low is None or high is None else f" ({confidence} CI {cost.text(low)} to {cost.text(high)})"
    yield f"<b>{html.escape(point.name)}</b>"
    yield f"{cost.title} {cost.text(value or 0.0)}{ends}"
    if point.accuracy is not None:
        below, above = wilson(point.accuracy, samples, point.latency.confidence)
        yield f"accuracy {percent(point.accuracy)} ({confidence} CI {percent(below)} to {percent(above)})"
    if point.share is not None:
        yield f"{percent(point.share)} of the stream left here"


def wilson(share: float, samples: int, confidence: float) -> tuple[float, float]:
    """Score interval of a binomial share (Wilson, JASA 22, 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    return min(centre - half, share), max(centre + half, share)
