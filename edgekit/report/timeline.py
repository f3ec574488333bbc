"""Charts of what lies in time: power with the windows of energy, the parts of an inference, and what gates save."""

from __future__ import annotations

import html

import numpy as np

from edgekit.measured import StageTime, Window
from edgekit.records import Profile
from edgekit.report.charts import QUIET, STREAM_COLOUR, Figure, row_colours
from edgekit.report.formats import duration, energy, percent, time_unit

__all__ = ["gates_figure", "power_figure", "stages_figure"]

POWER = "power"
_POINTS = 3000
"""Of power that are drawn: the lowest and the highest of each stretch where there are more."""
_KINDS = {
    "idle": "#78716c", "exit": "#3b82f6", "stream": STREAM_COLOUR, "path": "#a855f7", "paced": "#10b981",
    "slope": "#06b6d4",
}  # fmt: skip
_PARTS = {
    "boundary": "#a8a29e", "compute without head": "#3b82f6", "head and score": "#a855f7", "decision": "#f59e0b",
}  # fmt: skip


def power_figure(profile: Profile) -> Figure | None:
    """Power over time; each window a bar as high as its mean power, so that its area is its energy.

    Traces carry the windows' kind, or ``"power"``, as ``meta``. ``None`` for a profile without windows.
    """
    if not profile.windows:
        return None
    kinds = dict.fromkeys(window.kind for window in profile.windows)
    traces: list[Figure] = [_bars(profile, kind) for kind in kinds]
    if profile.power.times_s:
        times, watts = _thinned(np.asarray(profile.power.times_s), np.asarray(profile.power.power_w))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": POWER,
                "meta": POWER,
                "x": [float(f"{time:.7g}") for time in times],
                "y": [float(f"{watt:.5g}") for watt in watts],
                "line": {"color": QUIET, "width": 1},
                "hovertext": [_during(profile, float(time)) for time in times],
                "hovertemplate": "%{y:.3f} W at %{x:.1f} s%{hovertext}<extra></extra>",
            }
        )
    ends = [*profile.power.times_s, *(window.start_s for window in profile.windows)]
    ends += [window.stop_s for window in profile.windows]
    layout = {
        "xaxis": {"title": {"text": "time since the profile's zero [s]"}, "range": [min(ends), max(ends)]},
        "yaxis": {"title": {"text": "power [W]"}, "rangemode": "tozero"},
        "barmode": "overlay",
        "hovermode": "closest",
    }
    return {"data": traces, "layout": layout}


def _bars(profile: Profile, kind: str) -> Figure:
    some = [window for window in profile.windows if window.kind == kind]
    colours = row_colours(profile)
    return {
        "type": "bar",
        "name": kind,
        "meta": kind,
        "x": [(window.start_s + window.stop_s) / 2 for window in some],
        "width": [window.stop_s - window.start_s for window in some],
        "y": [window.energy_j / (window.stop_s - window.start_s) for window in some],
        "marker": {"color": [colours.get(window.name, _KINDS[kind]) for window in some], "line": {"width": 0}},
        "opacity": 0.5,
        "hoverinfo": "text",
        "hovertext": [_window(window) for window in some],
    }


def _window(window: Window) -> str:
    long = window.stop_s - window.start_s
    lines = [
        f"<b>{html.escape(window.name)}</b> ({window.kind})",
        f"{long:.2f} s from {window.start_s:.2f} s, {window.updates} sensor updates",
        f"{window.energy_j:.4g} J ± {window.bound_j:.2g} J, mean {window.energy_j / long:.3f} W",
    ]
    if window.gap_s:
        lines.append(f"{duration(window.gap_s)} without a reading")
    if window.inferences:
        lines.append(f"{window.inferences} inferences, {energy(window.energy_j / window.inferences)} each")
    if window.median_s is not None:
        lines.append(f"median {duration(window.median_s)}")
    return "<br>".join(lines)


def _during(profile: Profile, time_s: float) -> str:
    inside = (window.name for window in profile.windows if window.start_s <= time_s <= window.stop_s)
    return "".join(f", {html.escape(name)}" for name in inside)


def _thinned(
    times: np.ndarray[tuple[int, ...], np.dtype[np.float64]], values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float64]], np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """At most :data:`_POINTS` of them: of every stretch the lowest and the highest, so that no spike is lost."""
    if len(times) <= _POINTS:
        return times, values
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(times)), _POINTS // 2):
        ends = {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
        kept += sorted(ends)
    return times[kept], values[kept]


def stages_figure(profile: Profile) -> Figure | None:
    """Each stage as a bar of its parts, laid end to end; ``None`` where that was not measured."""
    if not profile.stages:
        return None
    unit = time_unit(stage.compute.value for stage in profile.stages)
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part,
            "meta": part,
            "y": [html.escape(stage.name) for stage in profile.stages],
            "x": [_parts(stage)[part] / unit.scale for stage in profile.stages],
            "marker": {"color": colour},
            "hoverinfo": "text",
            "hovertext": [
                f"<b>{html.escape(stage.name)}</b>, {percent(stage.share)} of the time<br>{part} "
                f"{duration(_parts(stage)[part])}"
                for stage in profile.stages
            ],
        }
        for part, colour in _PARTS.items()
    ]
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": f"median time [{unit.symbol}]"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "height": max(220, 90 + 34 * len(profile.stages)),
    }
    return {"data": traces, "layout": layout}


def _parts(stage: StageTime) -> dict[str, float]:
    """Seconds by part. A head whose interval goes below zero is drawn as none, and compute as the whole."""
    head = max(stage.head.value, 0.0) if stage.head is not None else 0.0
    decision = stage.decision.value if stage.decision is not None else 0.0
    values = (stage.boundary.value, stage.compute.value - head, head, decision)
    return dict(zip(_PARTS, values, strict=True))


def gates_figure(profile: Profile) -> Figure | None:
    """Median latency that closing each gate saves, with its interval; ``None`` where there are no gates."""
    known = [(path.name, path.saved_s) for path in profile.paths if path.saved_s is not None]
    if not known:
        return None
    unit = time_unit(saved.value for _, saved in known)
    error = {"type": "data", "symmetric": False, "color": QUIET}
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [html.escape(name) for name, _ in known],
        "x": [saved.value / unit.scale for _, saved in known],
        # A gate of which nobody knows whether it saves anything is pale.
        "marker": {"color": ["rgba(59,130,246,0.35)" if saved.spans_zero else "#3b82f6" for _, saved in known]},
        "error_x": error
        | {
            "array": [(saved.high - saved.value) / unit.scale for _, saved in known],
            "arrayminus": [(saved.value - saved.low) / unit.scale for _, saved in known],
        },
        "hoverinfo": "text",
        "hovertext": [
            f"<b>{html.escape(name)}</b><br>saves {duration(saved.value)} ({duration(saved.low)} to "
            f"{duration(saved.high)}{', spans zero' if saved.spans_zero else ''})"
            for name, saved in known
        ],
    }
    layout = {
        "xaxis": {"title": {"text": f"median latency saved [{unit.symbol}]"}},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "height": max(160, 90 + 34 * len(known)),
        "showlegend": False,
    }
    return {"data": [trace], "layout": layout}
