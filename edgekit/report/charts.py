"""A profile as plotly figures: plain mappings of traces and layout, written into the page as JSON.

Colours of text and grid are the page's (it knows whether it is light or dark); colours of data are chosen here, so that
an exit looks the same in every chart.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from edgekit.records import Profile
from edgekit.report.formats import Unit, duration, energy, energy_unit, percent, time_unit
from edgekit.report.tables import Row, labels, rows

__all__ = ["Figure", "cdf", "energies", "exit_colours", "shares", "tradeoff"]

Figure = dict[str, Any]

STREAM_COLOUR = "#f59e0b"
PROFILE_COLOURS = ("#3b82f6", "#f43f5e", "#10b981", "#a855f7", "#06b6d4", "#84cc16", "#ec4899", "#78716c")
_QUIET = "rgba(128,137,155,0.65)"
_FAINT = "rgba(128,137,155,0.5)"
_RAMP = ((13, 148, 136), (59, 130, 246), (139, 92, 246), (217, 70, 160), (225, 60, 80))
_CDF_POINTS = 400
_LOG_RATIO = 8.0
"""A latency axis is logarithmic when its largest value is this many times its smallest."""


def exit_colours(count: int) -> tuple[str, ...]:
    """One colour per exit, from early (teal) to late (red), readable on white and on black."""
    places = np.linspace(0, len(_RAMP) - 1, count) if count > 1 else np.asarray([1.0])
    channels = [np.interp(places, range(len(_RAMP)), channel) for channel in zip(*_RAMP, strict=True)]
    return tuple("#" + "".join(f"{round(part):02x}" for part in colour) for colour in zip(*channels, strict=True))


def tradeoff(profiles: Sequence[Profile]) -> Figure:
    """Accuracy against mean latency: forced exits joined by a line, the policy's stream as a star.

    Where the data has no labels, every row takes a line of its own instead of an accuracy.
    """
    unit = time_unit(row.latency.mean_s for profile in profiles for row in rows(profile))
    labelled = all(row.accuracy is not None for profile in profiles for row in rows(profile))
    traces: list[Figure] = []
    for number, (profile, label) in enumerate(zip(profiles, labels(profiles), strict=True)):
        colour = None if len(profiles) == 1 else PROFILE_COLOURS[number % len(PROFILE_COLOURS)]
        exits, stream = rows(profile)[:-1], rows(profile)[-1]
        points = {"color": colour or list(exit_colours(len(exits))), "size": 11}
        named = "+text" if number == 0 else ""
        traces.append(
            _points(exits, unit, profile, labelled)
            | {
                "name": html.escape(f"{label}: exits" if colour else "forced exits"),
                "mode": f"lines+markers{named}",
                "line": {"color": colour or _QUIET, "width": 2},
                "marker": points,
            }
        )
        traces.append(
            _points((stream,), unit, profile, labelled)
            | {
                "name": html.escape(f"{label}: stream" if colour else "stream with the policy"),
                "mode": "markers" if colour else "markers+text",
                "marker": {"color": colour or STREAM_COLOUR, "size": 18, "symbol": "star", "line": {"width": 1}},
                "textposition": "top left",
            }
        )
    layout = {
        "xaxis": {"title": {"text": f"mean latency of one inference [{unit.symbol}]"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "accuracy"}, "tickformat": ".0%"} if labelled else {"autorange": "reversed"},
        "hovermode": "closest",
    }
    return {"data": traces, "layout": layout}


def _points(some: Sequence[Row], unit: Unit, profile: Profile, labelled: bool) -> Figure:
    names = [html.escape(row.short) for row in some]
    means = [row.latency.mean_s / unit.scale for row in some]
    error = {"type": "data", "symmetric": False, "color": _FAINT, "thickness": 1.2, "width": 4}
    figure: Figure = {
        "type": "scatter",
        "x": means,
        "y": [row.accuracy for row in some] if labelled else names,
        "text": names if labelled else None,
        "textposition": ["bottom right"] * (len(some) - 1) + ["bottom left"],
        "cliponaxis": False,
        "hoverinfo": "text",
        "hovertext": [_hover(row, profile.samples) for row in some],
        "error_x": error
        | {
            "array": [row.latency.mean_high_s / unit.scale - mean for row, mean in zip(some, means, strict=True)],
            "arrayminus": [mean - row.latency.mean_low_s / unit.scale for row, mean in zip(some, means, strict=True)],
        },
    }
    if labelled:
        intervals = [_wilson(row.accuracy or 0.0, profile.samples, row.latency.confidence) for row in some]
        figure["error_y"] = error | {
            "array": [high - (row.accuracy or 0.0) for row, (_, high) in zip(some, intervals, strict=True)],
            "arrayminus": [(row.accuracy or 0.0) - low for row, (low, _) in zip(some, intervals, strict=True)],
        }
    return figure


def _hover(row: Row, samples: int) -> str:
    interval = f"{duration(row.latency.mean_low_s)} to {duration(row.latency.mean_high_s)}"
    confidence = percent(row.latency.confidence, digits=0)
    lines = [f"<b>{html.escape(row.name)}</b>", f"mean {duration(row.latency.mean_s)} ({confidence} CI {interval})"]
    if row.accuracy is not None:
        low, high = _wilson(row.accuracy, samples, row.latency.confidence)
        lines.append(f"accuracy {percent(row.accuracy)} ({confidence} CI {percent(low)} to {percent(high)})")
    if row.share is not None and not row.stream:
        lines.append(f"{percent(row.share)} of the stream left here")
    return "<br>".join(lines)


def _wilson(share: float, samples: int, confidence: float) -> tuple[float, float]:
    """Score interval of a binomial share (Wilson, JASA 22, 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    return min(centre - half, share), max(centre + half, share)


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
    """Gross energy of one inference at each exit and of the stream; ``None`` where no row has a figure."""
    every = [row for row in rows(profile) if row.energy.gross_j is not None]
    if not every:
        return None
    unit = energy_unit(row.energy.gross_j for row in every)
    values = [(row.energy.gross_j or 0.0) / unit.scale for row in every]
    texts = [
        f"<b>{html.escape(row.name)}</b><br>gross {energy(row.energy.gross_j)}<br>net {energy(row.energy.net_j)}"
        for row in every
    ]
    axis = {"title": {"text": f"gross energy of one inference [{unit.symbol}]"}, "rangemode": "tozero"}
    figure = _bars(every, values, labels=[energy(row.energy.gross_j) for row in every], hover=texts, axis=axis)
    exits = rows(profile)[:-1]
    by_name = dict(zip([row.name for row in exits], exit_colours(len(exits)), strict=True))
    figure["data"][0]["marker"]["color"] = [STREAM_COLOUR if row.stream else by_name[row.name] for row in every]
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
    """Share of inferences that take no longer: one curve per exit, a wide one for the stream."""
    series = [(row.short, item.latency_ns) for row, item in zip(rows(profile), profile.exits, strict=False)]
    curves = [
        (name, taken, {"color": colour, "width": 2})
        for (name, taken), colour in zip(series, exit_colours(len(series)), strict=True)
    ]
    curves.append(("stream", profile.stream.latency_ns, {"color": STREAM_COLOUR, "width": 3.5}))
    present = [(name, np.sort(np.asarray(taken, float)) / 1e9, line) for name, taken, line in curves if taken]
    unit = time_unit(float(np.median(ordered)) for _, ordered, _ in present)
    traces = []
    for name, ordered, line in present:
        places = _decimated(len(ordered))
        # Five digits are finer than any clock's scatter, and keep the file small.
        trace = {
            "type": "scatter",
            "mode": "lines",
            "name": html.escape(name),
            "x": [float(f"{value / unit.scale:.5g}") for value in ordered[places]],
            "y": [float(f"{(place + 1) / len(ordered):.5g}") for place in places],
            "line": line | {"shape": "hv"},
            "hovertemplate": f"%{{y:.1%}} within %{{x:.4g}} {unit.symbol}",
        }
        traces.append(trace)
    smallest = min((float(ordered[0]) for _, ordered, _ in present), default=1.0)
    largest = max((float(ordered[-1]) for _, ordered, _ in present), default=1.0)
    logarithmic = smallest > 0 and largest / smallest > _LOG_RATIO
    heading = f"latency of one inference [{unit.symbol}]"
    axis: Figure = {"title": {"text": heading}}
    if logarithmic:
        ticks = _ticks(smallest / unit.scale, largest / unit.scale)
        axis = {"title": {"text": f"{heading}, log scale"}, "type": "log", "tickvals": ticks}
    y = {"title": {"text": "share within"}, "tickformat": ".0%", "range": [0, 1.02]}
    return {"data": traces, "layout": {"xaxis": axis, "yaxis": y, "hovermode": "closest"}}


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
