"""Profiles and comparisons as rich tables that fit 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from edgekit.records import Profile
from edgekit.report.compare import Comparison, Pair
from edgekit.report.facts import (
    Fact,
    cards,
    closure_text,
    environment_facts,
    guarantee_text,
    scripted_text,
)
from edgekit.report.formats import duration, in_unit, size
from edgekit.report.grid import NAME_LENGTHS, fits, hanging, headed, sheet_table
from edgekit.report.sheets import sheets
from edgekit.report.tables import Column, columns, energy_reasons, gate_lines, notes, rows, short_names
from edgekit.report.validity import validity

__all__ = ["comparison_table", "print_comparison", "print_profile", "profile_table"]

_SUMMARY = ("processor", "cores", "affinity", "governor", "frequency", "temperature", "other work")
"""What the environment summary says of the machine."""
_DISPENSABLE = ("p90", "MACs", "CI", "share", "p99")
"""Ends of the titles of columns that a narrow terminal goes without, first to go first."""


def profile_table(profile: Profile, *, width: int = 100) -> Table:
    """The per-exit table: exits in order, then the stream. Where ``width`` is too narrow, figures are left out."""
    return _exit_table(profile, _fitting(profile, width))


def _fitting(profile: Profile, width: int) -> list[Column]:
    shown = [column for column in columns([profile]) if not column.detail]
    for title in _DISPENSABLE:
        if fits(_exit_table(profile, shown), width):
            break
        shown = [column for column in shown if not column.title.endswith(title)]
    return shown


def _exit_table(profile: Profile, shown: Sequence[Column]) -> Table:
    every = rows(profile)
    table = headed(f"{profile.network} on {_runtime(profile)}", [column.title for column in shown])
    for row in every:
        cells = [Text(row.short), *(Text(column.text(row)) for column in shown[1:])]
        table.add_row(*cells, style="bold" if row.stream else "", end_section=row is every[-2])
    return table


def print_profile(profile: Profile, *, console: Console) -> None:
    """Validity, the per-exit table and the others, and what a reader needs beside them: warnings, closure, machine."""
    _print_validity(profile, console)
    banner = scripted_text(profile)
    if banner is not None:
        console.print(Panel(Text(banner), border_style="yellow", title="scripted", title_align="left"))
    console.print(profile_table(profile, width=console.width))
    for sheet in sheets(profile):
        console.print(sheet_table(sheet, width=console.width))
    console.print(_facts(_lines(profile, width=console.width)))
    for warning in profile.warnings:
        console.print(hanging("warning", warning, style="yellow"))


def _print_validity(profile: Profile, console: Console) -> None:
    found = validity(profile)
    style = {"valid": "bold green", "invalid": "bold red", "unjudged": "bold"}[found.state]
    known = found.state != "unjudged" and (found.passed or found.unseen)
    console.print(Text(f"{found.headline}; {found.counts}" if known else found.headline, style=style))
    if found.incomplete:
        console.print(hanging("incomplete", found.incomplete, style="red"))
    for check in found.broken:
        console.print(hanging(check.rule, f"{check.says}; {check.advice}", style="red"))
    for check in found.unseen:
        console.print(hanging(check.rule, f"not looked at: {check.says}", style="dim"))


def comparison_table(comparison: Comparison, pair: Pair, *, width: int = 100) -> Table:
    """Figures of one profile beside those of the first, a line each, with as long names as fit."""
    names = list(dict.fromkeys(each.name for each in pair.differences))
    for most in NAME_LENGTHS:
        table = _compared(comparison, pair, dict(zip(names, short_names(names, most=most), strict=True)))
        if fits(table, width):
            break
    return table


def _compared(comparison: Comparison, pair: Pair, shorts: Mapping[str, str]) -> Table:
    table = headed(f"{pair.other} against {comparison.baseline}", ["", "", "baseline", "this", "change", "accuracy"])
    table.columns[1].justify = table.columns[4].justify = "left"
    before = ""
    for each in pair.differences:
        style = {"worse": "bold red", "better": "green"}.get(each.verdict, "dim")
        table.add_row(
            Text("" if each.name == before else shorts[each.name]),
            each.quantity,
            in_unit(each.baseline, each.unit),
            in_unit(each.other, each.unit),
            Text(each.text, style=style),
            "" if each.accuracy_change is None else each.accuracy_text,
        )
        before = each.name
    return table


def print_comparison(comparison: Comparison, *, console: Console) -> None:
    """What got worse, the comparison's table, then what else differs between the profiles."""
    for sentence in comparison.worse:
        console.print(hanging("worse", sentence, style="red"))
    if not comparison.worse:
        console.print(Text("nothing got worse", style="bold green"))
    for pair in comparison.pairs:
        console.print(comparison_table(comparison, pair, width=console.width))
        if pair.changes:
            console.print(Text(f"{pair.other} also differs in", style="bold"))
            table = headed(None, ["", "baseline", "this"])
            for column in table.columns:
                column.justify, column.overflow, column.no_wrap = "left", "fold", False
            for change in pair.changes:
                table.add_row(Text(change.name), Text(change.baseline), Text(change.other))
            console.print(table)
        else:
            console.print(Text(f"{pair.other}: same machine, runtime, network, policy, data and protocol"))
        for note in pair.notes:
            console.print(hanging("note", note, style="yellow"))
    console.print(Text(comparison.caveat, style="dim"))


def _lines(profile: Profile, *, width: int) -> Iterator[Fact]:
    accuracy, speed_up, early, _ = cards(profile)
    yield Fact("stream", f"speed-up {speed_up.value}: {speed_up.detail}")
    yield Fact("", f"{early.value} leave early; accuracy {accuracy.value}: {accuracy.detail}")
    yield Fact("closure", closure_text(profile.closure))
    if profile.energy_closure is not None:
        yield Fact("", closure_text(profile.energy_closure))
    if profile.gates:
        yield Fact("gates open", ", ".join(f"{name} {share}" for name, share, _ in gate_lines(profile)))
    yield Fact("policy", f"{profile.policy.get('name', '')}; guarantee: {guarantee_text(profile.policy)}")
    for note in (*notes(profile), *energy_reasons(profile)):
        yield Fact("note", note)
    kept = {column.title for column in _fitting(profile, width)}
    absent = [column.title for column in columns([profile]) if not column.detail and column.title not in kept]
    if absent:
        yield Fact("note", f"{', '.join(absent)}: left out, the terminal is {width} columns wide")
    yield Fact(
        "process",
        f"opened in {duration(profile.load_s)}, first inference {duration(profile.first_run_s)}, "
        f"peak memory {size(profile.peak_rss_bytes)}",
    )
    for fact in environment_facts(profile):
        if fact.name in _SUMMARY:
            yield Fact(fact.name, f"{fact.value} → {fact.after}" if fact.changed else fact.value)


def _facts(facts: Iterator[Fact]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for fact in facts:
        grid.add_row(Text(fact.name), Text(fact.value))
    return grid


def _runtime(profile: Profile) -> str:
    known = [str(profile.runtime[name]) for name in ("name", "version") if profile.runtime.get(name)]
    return " ".join(known) or "an unnamed runtime"
