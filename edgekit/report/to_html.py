"""One self-contained HTML file: nothing is fetched from anywhere, and the page forbids itself to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit.errors import MeasurementError
from edgekit.records import Profile
from edgekit.report import charts, facts, tables
from edgekit.report.compare import compare
from edgekit.report.costs import cost_figures
from edgekit.report.files import write_aside
from edgekit.report.formats import in_unit
from edgekit.report.page import template
from edgekit.report.sheets import operator_sheet, sheets, window_sheet
from edgekit.report.timeline import gates_figure, power_figure, stages_figure
from edgekit.report.validity import validity

__all__ = ["write_html"]


def write_html(profiles: Sequence[Profile], path: str | Path, *, title: str | None = None) -> Path:
    """Write a report of one or more profiles; several are held against the first.

    Args:
        profiles: in the order they are shown.
        path: file to write; written aside and renamed.
        title: heading; the network's name where not given.

    Raises:
        MeasurementError: there is no profile, or the file cannot be written.
        MissingExtraError: plotly or jinja2 is not installed.
    """
    if not profiles:
        raise MeasurementError(f"{path}: there is no profile to report; measure one with edgekit profile")
    page = template("report.html.j2", in_unit=in_unit)
    figures: dict[str, charts.Figure] = {"tradeoff": cost_figures(profiles)}
    names = tables.labels(profiles)
    views = [
        _view(profile, name, number, figures)
        for number, (profile, name) in enumerate(zip(profiles, names, strict=True))
    ]
    several = len(profiles) > 1
    text = page.render(
        title=title or _title(profiles),
        views=views,
        comparison=compare(profiles, other_networks=True, other_hosts=True, invalid=True) if several else None,
        labelled=all(row.accuracy is not None for profile in profiles for row in tables.rows(profile)),
        figures=figures,
    )
    return write_aside(path, text)


def _title(profiles: Sequence[Profile]) -> str:
    networks = list(dict.fromkeys(profile.network for profile in profiles))
    return networks[0] if len(profiles) == 1 else f"{' and '.join(networks)}: {len(profiles)} profiles"


def _view(profile: Profile, label: str, number: int, figures: dict[str, charts.Figure]) -> dict[str, Any]:
    """What the template shows of one profile; its figures are added to ``figures``."""
    made = {
        "shares": charts.shares(profile),
        "cdf": charts.cdf(profile),
        "energy": charts.energies(profile),
        "power": power_figure(profile),
        "stages": stages_figure(profile),
        "gates": gates_figure(profile),
    }
    drawn = {name: figure for name, figure in made.items() if figure is not None}
    figures |= {f"{name}-{number}": figure for name, figure in drawn.items()}
    every = tables.rows(profile)
    meters = {row.energy.meter: row.energy for row in every if row.energy.gross_j is not None}
    closure = profile.energy_closure
    return {
        "number": number,
        "label": label,
        "profile": profile,
        "figures": made,
        "validity": validity(profile),
        "scripted": facts.scripted_text(profile),
        "cards": facts.cards(profile),
        "columns": _stacked(tables.columns([profile])),
        "rows": [(row, charts.row_colours(profile)[row.name]) for row in every],
        "sheets": dict.fromkeys(("stages", "paths", "paced", "operators", "windows"))
        | {
            sheet.key: sheet
            for sheet in (*sheets(profile), operator_sheet(profile), window_sheet(profile))
            if sheet is not None
        },
        "gates": tables.gate_lines(profile),
        "notes": tables.notes(profile),
        "closure": facts.closure_text(profile.closure),
        "energy_reasons": tables.energy_reasons(profile),
        "meters": list(meters.values()),
        "energy_closure": None if closure is None else facts.closure_text(closure),
        "environment": facts.environment_facts(profile),
        "run": facts.run_facts(profile),
        "policy": facts.policy_facts(profile),
        "guarantee": facts.guarantee_text(profile.policy),
    }


def _stacked(columns: Sequence[tables.Column]) -> list[tuple[tables.Column, tables.Column | None]]:
    """Each column with the interval that goes below its figures."""
    after = (*columns[1:], None)
    return [
        (column, below if below is not None and below.under else None)
        for column, below in zip(columns, after, strict=True)
        if not column.under
    ]
