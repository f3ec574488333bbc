"""A profile as plotly figures: plain mappings of traces and layout, written into the page as JSON.

Beside plotly's own, a figure may have ``choices`` (figures by name, of which the page shows one), ``axes`` (x axes by
name, likewise) and traces with ``meta``, the name of the row or kind that a reader can switch off. Colours of text and
grid are the page's (it knows whether it is light or dark); colours of data are chosen here, so that an exit looks the
same in every chart.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from edgekit.records import Profile
from edgekit.report.formats import energy, energy_unit, percent, ranged, time_unit
from edgekit.report.sheets import rate_text
from edgekit.report.tables import STREAM, Row, rows

__all__ = ["FAINT", "QUIET", "STREAM_COLOUR", "Figure", "cdf", "energies", "exit_colours", "row_colours", "shares"]

Figure = dict[str, Any]

STREAM_COLOUR = "#f59e0b"
QUIET = "rgba(128,137,155,0.65)"
FAINT = "rgba(128,137,155,0.5)"
_RAMP = ((13, 148, 136), (59, 130, 246), (139, 92, 246), (217, 70, 160), (225, 60, 80))
_CDF_POINTS = 400
_LOG_RATIO = 8.0
"""A latency axis is logarithmic when its largest value is this many times its smallest."""


def exit_colours(count: int) -> tuple[str, ...]:
    """One colour per exit, from early (teal) to late (red), readable on white and on black."""
    places = np.linspace(0, len(_RAMP) - 1, count) if count > 1 else np.asarray([1.0])
    channels = [np.interp(places, range(len(_RAMP)), channel) for channel in zip(*_RAMP, strict=True)]
    return tuple("#" + "".join(f"{round(part):02x}" for part in colour) for colour in zip(*channels, strict=True))


def row_colours(profile: Profile) -> dict[str, str]:
    """The colour of every exit and of the stream, by name."""
    names = [item.name for item in profile.exits]
    return dict(zip(names, exit_colours(len(names)), strict=True)) | {STREAM: STREAM_COLOUR}


def shares(profile: Profile) -> Figure:
    """Share of the stream's samples that left at each exit."""
    exits = rows(profile)[:-1]
    texts = [
        f"{percent(row.share)} left at {html.escape(row.name)}"
        + (f"<br>{percent(row.share_accuracy)} of them right" if row.share_accuracy is not None else "")
        for row in exits
    ]
    return _bars(
        exits,
        [row.share for row in exits],
        labels=[percent(row.share) for row in exits],
        hover=texts,
        axis={"title": {"text": "share of the stream"}, "tickformat": ".0%", "rangemode": "tozero"},
    )


def energies(profile: Profile) -> Figure | None:
    """Energy of one inference at each exit and of the stream, gross or net; ``None`` where no row has a figure."""
    kinds = {
        "gross": lambda row: (row.energy.gross_j, row.energy.low_j, row.energy.high_j),
        "net": lambda row: (row.energy.net_j, row.energy.net_low_j, row.energy.net_high_j),
    }
    found = {name: _energies(profile, name, of) for name, of in kinds.items()}
    choices = {name: figure for name, figure in found.items() if figure is not None}
    return {"choices": choices} if choices else None


_Ends = tuple["float | None", "float | None", "float | None"]


def _energies(profile: Profile, name: str, of: Callable[[Row], _Ends]) -> Figure | None:
    every = [(row, *of(row)) for row in rows(profile)]
    known = [(row, value, low, high) for row, value, low, high in every if value is not None]
    if not known:
        return None
    unit = energy_unit(value for _, value, _, _ in known)
    texts = [
        f"<b>{html.escape(row.name)}</b><br>{name} {energy(value)}"
        + ("" if low is None else f" ({ranged(low, high, unit)} {unit.symbol})")
        for row, value, low, high in known
    ]
    axis = {"title": {"text": f"{name} energy of one inference [{unit.symbol}]"}, "rangemode": "tozero"}
    some = [row for row, *_ in known]
    labels = [energy(value) for _, value, _, _ in known]
    figure = _bars(some, [value / unit.scale for _, value, _, _ in known], labels=labels, hover=texts, axis=axis)
    colours = row_colours(profile)
    trace = figure["data"][0]
    trace["marker"]["color"] = [colours[row.name] for row in some]
    trace["error_y"] = {
        "type": "data",
        "symmetric": False,
        "color": QUIET,
        "array": [((value if high is None else high) - value) / unit.scale for _, value, _, high in known],
        "arrayminus": [(value - (value if low is None else low)) / unit.scale for _, value, low, _ in known],
    }
    trace["textposition"] = "inside"
    trace["insidetextanchor"] = "start"
    trace["textangle"] = 0
    return figure


def _bars(
    some: Sequence[Row], values: Sequence[float | None], *, labels: list[str], hover: list[str], axis: Figure
) -> Figure:
    trace = {
        "type": "bar",
        "x": [html.escape(row.short) for row in some],
        "y": list(values),
        "text": labels,
        "textposition": "outside",
        "cliponaxis": False,
        "hoverinfo": "text",
        "hovertext": hover,
        "marker": {"color": list(exit_colours(len(some)))},
        "width": 0.62 if len(some) > 2 else 0.3,
    }
    layout = {"xaxis": {"type": "category"}, "yaxis": axis, "showlegend": False}
    return {"data": [trace], "layout": layout}


def cdf(profile: Profile) -> Figure:
    """Share of inferences that take no longer: a curve per row, a wide one for the stream, dashes for what is paced.

    ``axes`` are ``"linear"`` and ``"log"``, and ``log`` says which helps; paths through gates are ``off`` at first.
    """
    present = [(name, np.sort(np.asarray(taken, float)) / 1e9, line) for name, taken, line in _curves(profile) if taken]
    unit = time_unit(float(np.median(ordered)) for _, ordered, _ in present)
    traces = []
    for name, ordered, line in present:
        places = _decimated(len(ordered))
        # Five digits are finer than any clock's scatter, and keep the file small.
        trace = {
            "type": "scatter",
            "mode": "lines",
            "name": html.escape(name),
            "meta": name,
            "x": [float(f"{value / unit.scale:.5g}") for value in ordered[places]],
            "y": [float(f"{(place + 1) / len(ordered):.5g}") for place in places],
            "line": line | {"shape": "hv"},
            "hovertemplate": f"%{{y:.1%}} within %{{x:.4g}} {unit.symbol}",
        }
        traces.append(trace)
    smallest = min((float(ordered[0]) for _, ordered, _ in present), default=1.0)
    largest = max((float(ordered[-1]) for _, ordered, _ in present), default=1.0)
    heading = f"latency of one inference [{unit.symbol}]"
    axes: Figure = {"linear": {"title": {"text": heading}}}
    if smallest > 0:
        ticks = _ticks(smallest / unit.scale, largest / unit.scale)
        axes["log"] = {"title": {"text": f"{heading}, log scale"}, "type": "log", "tickvals": ticks}
    y = {"title": {"text": "share within"}, "tickformat": ".0%", "range": [0, 1.02]}
    return {
        "data": traces,
        "layout": {"yaxis": y, "hovermode": "closest", "showlegend": False},
        "axes": axes,
        "log": smallest > 0 and largest / smallest > _LOG_RATIO,
        "off": [path.name for path in profile.paths],
    }


def _curves(profile: Profile) -> Iterator[tuple[str, tuple[int, ...], Figure]]:
    """Name, raw latencies in nanoseconds and line of every row."""
    colours = row_colours(profile)
    for row, item in zip(rows(profile), profile.exits, strict=False):
        yield row.short, item.latency_ns, {"color": colours[item.name], "width": 2}
    yield STREAM, profile.stream.latency_ns, {"color": STREAM_COLOUR, "width": 3.5}
    for paced, dash in zip(profile.paced, itertools.cycle(("dash", "dot", "dashdot"))):
        name = f"{STREAM} {rate_text(paced.rate_hz)}"
        yield name, paced.latency_ns, {"color": STREAM_COLOUR, "width": 2, "dash": dash}
    for path, dash in zip(profile.paths, itertools.cycle(("solid", "dash", "dot", "dashdot"))):
        yield path.name, path.latency_ns, {"color": QUIET, "width": 2, "dash": dash}


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade; over four decades, 1 alone."""
    steps = (1, 2, 5) if high / low < 1e4 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [float(f"{step}e{decade}") for decade in decades for step in steps]


def _decimated(count: int) -> list[int]:
    """Positions of at most :data:`_CDF_POINTS` of ``count`` ordered samples; the slowest tail is kept whole."""
    if count <= _CDF_POINTS:
        return list(range(count))
    tail = _CDF_POINTS // 4
    body = np.linspace(0, count - tail - 1, _CDF_POINTS - tail).round().astype(int)
    return [*map(int, body), *range(count - tail, count)]
