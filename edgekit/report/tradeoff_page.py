"""A trade-off as one self-contained HTML page with a threshold explorer; nothing is fetched from anywhere.

Every text is made here; the page's script only chooses which of them to show.
"""

from __future__ import annotations

import html
import math
from typing import Any

from edgekit.certificate import Certificate, Point, Tradeoff
from edgekit.policy import Policy
from edgekit.report.charts import Figure, exit_colours
from edgekit.report.formats import percent, points
from edgekit.report.page import template
from edgekit.report.tables import short_names
from edgekit.report.tradeoff import (
    ACCEPTED,
    FAILED,
    NO_LABELS,
    TESTED,
    UNAVAILABLE,
    UNTESTED,
    Choice,
    Cost,
    Reading,
    bound_text,
    epsilon_text,
    finite,
)

__all__ = ["tradeoff_html"]

_MARKERS = {
    ACCEPTED: {"color": "#3b82f6", "size": 9, "symbol": "circle"},
    TESTED: {"color": "#3b82f6", "size": 9, "symbol": "circle"},
    FAILED: {"color": "#f43f5e", "size": 11, "symbol": "x"},
    UNTESTED: {"color": "rgba(128,137,155,0.9)", "size": 8, "symbol": "circle-open"},
}
_CHOSEN = {"color": "#f59e0b", "size": 17, "symbol": "star", "line": {"width": 1}}
_BAND, _LINE = "rgba(59,130,246,0.15)", "rgba(128,137,155,0.65)"
_PLACE = "place"
"""Stands for a cost on the axis where none is known."""
_STEPS = 40
"""A slider has at least so many."""


def tradeoff_html(tradeoff: Tradeoff, certificate: Certificate | None, *, title: str, policy: Policy) -> str:
    """The page of a calibration: promise, threshold explorer, whole curve, choices, exits, scores, certificate.

    Args:
        tradeoff: the path on the tested samples.
        certificate: of the policy; ``None`` says plainly that nothing is promised.
        title: heading.
        policy: as it was saved; its provenance says what was asked for.

    Raises:
        MissingExtraError: plotly or jinja2 is not installed.
    """
    page = template("tradeoff.html.j2", epsilon=epsilon_text, percent=percent)
    reading = Reading(tradeoff, certificate, policy)
    return page.render(
        title=title,
        reading=reading,
        colours=exit_colours(len(tradeoff.exits)),
        shorts=short_names(tradeoff.exits),
        cards=_cards(reading),
        rows=[_row(reading, choice) for choice in reading.choices],
        kinds=_kinds(reading),
        slider=_slider(reading.choices),
        data=_data(reading),
    )


def _data(reading: Reading) -> dict[str, Any]:
    """All that the page's script shows: a view of each policy, the choices among them, and the charts."""
    kinds = _kinds(reading)
    chosen = next((place for place, each in enumerate(reading.choices) if each.asked), None)
    first = Choice(epsilon=0.0, place=0)
    return {
        "policies": [_policy(reading, place) for place in range(len(reading.tradeoff.points))],
        "choices": [_choice(reading, each) for each in reading.choices],
        "first": _choice(reading, first),
        "asked": chosen,
        "chosen": reading.tradeoff.chosen,
        "figures": {kind: _figure(reading, kind) for kind in kinds},
    }


def _choice(reading: Reading, choice: Choice) -> dict[str, Any]:
    name, sentence = reading.standing(choice)
    return {"epsilon": choice.epsilon, "place": choice.place, "standing": name, "sentence": sentence}


def _policy(reading: Reading, place: int) -> dict[str, Any]:
    point = reading.tradeoff.points[place]
    last = len(reading.tradeoff.exits) - 1
    return {
        "cards": {key: {"value": value, "detail": detail} for key, _, value, detail in _figures(reading, point)},
        "shares": list(point.shares),
        "share_texts": [percent(share) for share in point.shares],
        "thresholds": [
            "accepts all" if exit_ == last else bound_text(point.thresholds[exit_]) for exit_ in range(last + 1)
        ],
        "constants": [text for _, text in reading.constants_of(point)],
        "name": f"policy {place + 1} of {len(reading.tradeoff.points)}"
        + (f" ({reading.never_name})" if not place else ""),
        "status": f"for the target asked for: {reading.status(place)}" if place else "needs no test",
        "early": f"; {percent(reading.early(point))} leave early" if last else "",
        "loss": finite(point.loss),
        "x": {kind: _x(reading, kind, place) for kind in _kinds(reading)},
    }


def _figures(reading: Reading, point: Point) -> list[tuple[str, str, str, str]]:
    """Key, title, figure and detail of each card."""
    answers, best = reading.answers(point), reading.answers(reading.never)
    of = reading.never_name
    detail = NO_LABELS
    if answers is not None:
        detail = "with the last exit; the samples have no labels"
        if not reading.agreement and best is not None:
            detail = f"{points(answers - best)} against {percent(best, digits=2)} of {of}"
    level = percent(reading.tradeoff.confidence, digits=0)
    found = [
        (
            "answers",
            reading.answers_title.capitalize(),
            UNAVAILABLE if answers is None else percent(answers, digits=2),
            detail,
        ),
        ("loss", "Mean loss", percent(finite(point.loss), digits=2), f"{reading.band(point)} ({level} interval)"),
    ]
    for cost in reading.costs:
        value, full = cost.of(point), cost.of(reading.never)
        detail = cost.reason if cost not in reading.known_costs else f"{reading.change(cost, point)} against "
        if cost in reading.known_costs:
            detail += f"{cost.text(full)} of {of}"
        found.append((cost.name, f"Mean {cost.title}", cost.text(value), detail))
    return found


def _cards(reading: Reading) -> list[dict[str, str]]:
    figures = _figures(reading, reading.chosen)
    return [{"key": key, "title": title, "value": value, "detail": detail} for key, title, value, detail in figures]


def _row(reading: Reading, choice: Choice) -> dict[str, Any]:
    """A line of the table of choices."""
    point = reading.tradeoff.points[choice.place]
    answers = reading.answers(point)
    cells = [percent(finite(point.loss), digits=2), UNAVAILABLE if answers is None else percent(answers, digits=2)]
    for cost in reading.known_costs:
        cells += [cost.text(cost.of(point)), reading.change(cost, point)]
    if len(point.shares) > 1:
        cells.append(percent(reading.early(point)))
    return {"choice": choice, "cells": cells, "standing": reading.standing(choice)[0]}


def _slider(choices: tuple[Choice, ...]) -> dict[str, Any] | None:
    """Range and step in percent, fine enough to come to each target; ``None`` without any."""
    if not choices:
        return None
    places = [100 * choice.epsilon for choice in choices]
    top = places[-1] * (1 if len(places) > 1 else 2)
    digits = next((n for n in range(4) if all(abs(value - round(value, n)) < 1e-6 for value in places)), 4)
    while digits < 4 and top * 10**digits < _STEPS:
        digits += 1
    step = 10.0**-digits
    start = next((100 * choice.epsilon for choice in choices if choice.asked), places[0])
    top = math.ceil(top / step - 1e-6) * step
    return {"top": f"{top:.{digits}f}", "step": f"{step:.{digits}f}", "start": f"{start:.6g}"}


def _kinds(reading: Reading) -> dict[str, str]:
    """What the horizontal axis may show: names and headings."""
    known = {cost.name: f"mean {cost.heading} of a sample" for cost in reading.known_costs}
    return known or {_PLACE: "place in the path (no cost is known)"}


def _x(reading: Reading, kind: str, place: int) -> float | None:
    cost: Cost | None = next((cost for cost in reading.known_costs if cost.name == kind), None)
    if cost is None:
        return float(place + 1)
    value = cost.of(reading.tradeoff.points[place])
    return None if value is None else value / cost.unit.scale


def _figure(reading: Reading, kind: str) -> Figure:
    """Mean loss against mean cost: band, path, policies by how they fared, the chosen one; the last trace is moved."""
    points_ = reading.tradeoff.points
    known = [(x, place) for place in range(len(points_)) if (x := _x(reading, kind, place)) is not None]
    ordered = sorted((x, place) for x, place in known if finite(points_[place].loss) is not None)
    xs, places = [x for x, _ in ordered], [place for _, place in ordered]
    lows = [finite(points_[place].low) for place in places]
    highs = [finite(points_[place].high) for place in places]
    level = percent(reading.tradeoff.confidence, digits=0)
    edge = {"type": "scatter", "mode": "lines", "x": xs, "line": {"width": 0}, "hoverinfo": "skip"}
    traces: list[Figure] = [
        edge | {"y": lows, "showlegend": False},
        edge | {"y": highs, "fill": "tonexty", "fillcolor": _BAND, "name": f"{level} interval of each point alone"},
        {
            "type": "scatter", "mode": "lines", "x": xs, "y": [points_[place].loss for place in places],
            "line": {"color": _LINE, "width": 1.5}, "hoverinfo": "skip", "showlegend": False,
        },
    ]  # fmt: skip
    for status, marker in _MARKERS.items():
        some = [(x, place) for x, place in ordered if reading.status(place) == status]
        if some:
            traces.append(_markers(reading, some, status, marker))
    chosen = [(x, place) for x, place in ordered if place == reading.tradeoff.chosen]
    traces.append(_markers(reading, chosen, "chosen", _CHOSEN))
    traces.append(
        {
            "type": "scatter", "mode": "markers", "name": "at the explorer's target", "hoverinfo": "skip",
            "x": [], "y": [],
            "marker": {"size": 24, "symbol": "circle-open", "color": "#f59e0b", "line": {"width": 2.5}},
        }
    )  # fmt: skip
    axis = {"title": {"text": f"mean loss: {html.escape(reading.loss_words)}"}, "tickformat": "~%", "zeroline": True}
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": _kinds(reading)[kind]}},
            "yaxis": axis,
            "hovermode": "closest",
            "legend": {"traceorder": "normal"},
            "shapes": _lines(reading),
            "annotations": _line_names(reading),
        },
    }


def _markers(reading: Reading, some: list[tuple[float, int]], name: str, marker: Figure) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x for x, _ in some],
        "y": [reading.tradeoff.points[place].loss for _, place in some],
        "marker": marker,
        "hoverinfo": "text",
        "hovertext": [_hover(reading, place) for _, place in some],
        "cliponaxis": False,
    }


def _hover(reading: Reading, place: int) -> str:
    point = reading.tradeoff.points[place]
    fate = reading.status(place) if place else reading.never_name
    if place and point.p_value is not None:
        fate += f" (p = {point.p_value:.3g})"
    lines = [
        f"policy {place + 1}: {fate}",
        f"mean loss: {percent(finite(point.loss), digits=2)}",
        f"{percent(reading.tradeoff.confidence, digits=0)} interval: {reading.band(point)}",
        *(f"{title}: {value}" for key, title, value, _ in _figures(reading, point) if key != "loss"),
        f"leave early: {percent(reading.early(point))}",
    ]
    return "<br>".join(map(html.escape, lines))


def _lines(reading: Reading) -> list[Figure]:
    if reading.asked is None:
        return []
    line = {"color": "#f43f5e", "width": 1.5, "dash": "dash"}
    place = {"xref": "paper", "x0": 0, "x1": 1, "y0": reading.asked, "y1": reading.asked}
    return [{"type": "line", "layer": "below", "line": line, **place}]


def _line_names(reading: Reading) -> list[Figure]:
    if reading.asked is None:
        return []
    place = {"xref": "paper", "x": 1, "y": reading.asked, "xanchor": "right", "yanchor": "bottom", "showarrow": False}
    return [{"text": f"ε = {epsilon_text(reading.asked)} asked for", "font": {"size": 12, "color": "#f43f5e"}, **place}]
