"""One self-contained HTML file: nothing is fetched from anywhere, and the page forbids itself to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit.errors import MeasurementError
from edgekit.records import Profile
from edgekit.report import charts, facts, tables
from edgekit.report.compare import compare
from edgekit.report.files import write_aside
from edgekit.report.formats import duration
from edgekit.report.page import template

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
    page = template("report.html.j2", duration=duration)
    figures: dict[str, charts.Figure] = {"tradeoff": charts.tradeoff(profiles)}
    names = tables.labels(profiles)
    views = [
        _view(profile, name, number, figures)
        for number, (profile, name) in enumerate(zip(profiles, names, strict=True))
    ]
    text = page.render(
        title=title or _title(profiles),
        views=views,
        comparison=compare(profiles, other_networks=True) if len(profiles) > 1 else None,
        labelled=all(row.accuracy is not None for profile in profiles for row in tables.rows(profile)),
        figures=figures,
    )
    return write_aside(path, text)


def _title(profiles: Sequence[Profile]) -> str:
    networks = list(dict.fromkeys(profile.network for profile in profiles))
    return networks[0] if len(profiles) == 1 else f"{' and '.join(networks)}: {len(profiles)} profiles"


def _view(profile: Profile, label: str, number: int, figures: dict[str, charts.Figure]) -> dict[str, Any]:
    """What the template shows of one profile; its figures are added to ``figures``."""
    figures[f"shares-{number}"] = charts.shares(profile)
    figures[f"cdf-{number}"] = charts.cdf(profile)
    spent = charts.energies(profile)
    if spent is not None:
        figures[f"energy-{number}"] = spent
    every = tables.rows(profile)
    meters = {row.energy.meter: row.energy for row in every if row.energy.gross_j is not None}
    closure = profile.energy_closure
    return {
        "number": number,
        "label": label,
        "profile": profile,
        "scripted": facts.scripted_text(profile),
        "cards": facts.cards(profile),
        "columns": tables.columns([profile]),
        "rows": list(zip(every, [*charts.exit_colours(len(every) - 1), charts.STREAM_COLOUR], strict=True)),
        "gates": tables.gate_lines(profile),
        "notes": tables.notes(profile),
        "closure": facts.closure_text(profile.closure),
        "energy": spent is not None,
        "energy_reasons": tables.energy_reasons(profile),
        "meters": list(meters.values()),
        "energy_closure": None if closure is None else facts.closure_text(closure, quantity="energy"),
        "environment": facts.environment_facts(profile),
        "run": facts.run_facts(profile),
        "policy": facts.policy_facts(profile),
        "guarantee": facts.guarantee_text(profile.policy),
    }
