"""A parity report as one self-contained HTML page: verdict, how far stages and exits lie apart, every flip."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from edgekit.parity_records import Flip, Parity, RunParity, Spread
from edgekit.report.charts import QUIET, Figure
from edgekit.report.facts import system_facts
from edgekit.report.files import write_aside
from edgekit.report.page import template
from edgekit.report.parity_sheets import budget_text, headline, parity_sheets, subject
from edgekit.report.tables import short_names

__all__ = ["write_parity"]

_KINDS = {"largest": "#3b82f6", "p99": "#0d9488", "median": QUIET}
_COSTS = {
    "answer lost": ("#f43f5e", "x"),
    "answer won": ("#0d9488", "diamond"),
    "other answer": ("#f59e0b", "circle"),
    "same answer": (QUIET, "circle-open"),
}
_LINE_HEIGHT, _EDGES = 26, 110
"""Pixels of one stage in the chart, and of what is around it."""


def write_parity(parity: Parity, path: str | Path) -> Path:
    """Write the page, aside and renamed.

    Raises:
        MeasurementError: the file cannot be written.
        MissingExtraError: plotly or jinja2 is not installed.
    """
    page = template("parity.html.j2")
    figures: dict[str, Figure] = {}
    views = [_view(parity, run, number, figures) for number, run in enumerate(parity.runs)]
    text = page.render(
        title=f"{parity.network}: {', '.join(run.label for run in parity.runs)} against {parity.reference}",
        parity=parity,
        subject=subject(parity),
        budget=budget_text(parity),
        views=views,
        facts=system_facts(parity.environment),
        figures=figures,
    )
    return write_aside(path, text)


def _view(parity: Parity, run: RunParity, number: int, figures: dict[str, Figure]) -> dict[str, Any]:
    """What the template shows of one runtime; its figures are added to ``figures``."""
    made = {"apart": _apart(parity, run), "flips": _flips(parity, run)}
    figures |= {f"{name}-{number}": figure for name, figure in made.items() if figure is not None}
    return {
        "number": number,
        "run": run,
        "headline": headline(parity, run),
        "same": not any(spread.largest or spread.unlike for _, _, spread in _spreads(run)),
        "figures": made,
        "sheets": list(parity_sheets(parity, run)),
    }


def _apart(parity: Parity, run: RunParity) -> Figure | None:
    """Differences of every stage and exit, by their scale; ``None`` where there are none to draw."""
    spreads = _spreads(run)
    shares = {name: [_share_of_scale(spread, name) for _, _, spread in spreads] for name in _KINDS}
    if not any(value for values in shares.values() for value in values):
        return None
    names = (*short_names([each.name for each in run.stages], most=28), *short_names([each.name for each in run.exits]))
    rows = [html.escape(f"{kind} {name}") for (_, kind, _), name in zip(spreads, names, strict=True)]
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "meta": name,
            # Nothing is drawn on a logarithmic axis for zero, nor for what has no scale.
            "x": [value or None for value in shares[name]],
            "y": rows,
            "marker": {"color": colour, "size": 10 if name == "largest" else 8},
            "hovertemplate": f"%{{y}}<br>{name} %{{x:.2e}} of the scale",
        }
        for name, colour in _KINDS.items()
    ]
    heading = "difference, as a share of the scale"
    layout = _layout(heading, len(rows), bound=parity.budget.difference, text="allowed at exits")
    layout["yaxis"]["autorange"] = "reversed"
    return {"data": traces, "layout": layout}


def _spreads(run: RunParity) -> list[tuple[str, str, Spread]]:
    """Of every stage's worst output and of every exit: name, kind and differences."""
    stages = [(each.name, "stage", each.worst.spread) for each in run.stages]
    return stages + [(each.name, "exit", each.spread) for each in run.exits]


def _share_of_scale(spread: Spread, name: str) -> float | None:
    return getattr(spread, name) / spread.scale if spread.scale > 0 else None


def _flips(parity: Parity, run: RunParity) -> Figure | None:
    """How far flipped samples' scores lie from the threshold, policy by policy; ``None`` without such flips.

    Those behind a gate that flipped are left out, as the budget leaves them out: their margin explains nothing.
    """
    every = [(each.policy, flip) for each in run.policies for flip in each.flips if flip.after_gate is None]
    known = [(policy, flip) for policy, flip in every if flip.margin and math.isfinite(flip.margin)]
    if not known:
        return None
    traces = []
    for name, (colour, symbol) in _COSTS.items():
        some = [(policy, flip) for policy, flip in known if _answer(flip) == name]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "meta": name,
                "x": [flip.margin for _, flip in some],
                "y": [html.escape(policy) for policy, _ in some],
                "hoverinfo": "text",
                "hovertext": [
                    f"sample {flip.sample}: {html.escape(flip.reference_exit)} → {html.escape(flip.exit)}"
                    f"<br>{flip.margin:.2g} from the threshold"
                    for _, flip in some
                ],
                "marker": {"color": colour, "symbol": symbol, "size": 10},
            }
        )
    policies = {policy for policy, _ in known}
    heading = "from the threshold to the score"
    layout = _layout(heading, len(policies), bound=parity.budget.margin, text="allowed")
    return {"data": traces, "layout": layout}


def _layout(heading: str, lines: int, *, bound: float | None, text: str) -> Figure:
    """Names beside a logarithmic axis, with a dashed line at what is allowed."""
    made: Figure = {
        "xaxis": {"type": "log", "title": {"text": heading}, "exponentformat": "power"},
        "yaxis": {"type": "category"},
        "height": _EDGES + _LINE_HEIGHT * lines,
        "showlegend": True,
        "hovermode": "closest",
    }
    if bound:  # a logarithmic axis has no place for zero
        line = {"color": "#f43f5e", "width": 1.5, "dash": "dash"}
        label = {"text": text, "textposition": "end", "textangle": 0, "xanchor": "left", "yanchor": "top"}
        ends = {"xref": "x", "x0": bound, "x1": bound, "yref": "paper", "y0": 0, "y1": 1}
        made["shapes"] = [{"type": "line", "line": line, "label": label} | ends]
    return made


def _answer(flip: Flip) -> str:
    if flip.cost:
        return "answer lost" if flip.cost > 0 else "answer won"
    return "other answer" if flip.answer_changed else "same answer"
