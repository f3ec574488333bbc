"""Profiles and comparisons as rich tables that fit 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from edgekit.records import Profile
from edgekit.report.compare import Comparison
from edgekit.report.facts import (
    Fact,
    cards,
    closure_text,
    environment_facts,
    guarantee_text,
    scripted_text,
)
from edgekit.report.formats import duration, size
from edgekit.report.tables import Column, columns, energy_reasons, gate_lines, notes, rows, short_names

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
        # Measured on a console of its own: the table's width when nothing is squeezed.
        if Console(width=10_000).measure(_exit_table(profile, shown)).maximum <= width:
            break
        shown = [column for column in shown if not column.title.endswith(title)]
    return shown


def _exit_table(profile: Profile, shown: Sequence[Column]) -> Table:
    every = rows(profile)
    table = _table(Text(f"{profile.network} on {_runtime(profile)}"), [column.title for column in shown])
    for row in every:
        cells = [Text(row.short), *(Text(column.text(row)) for column in shown[1:])]
        table.add_row(*cells, style="bold" if row.stream else "", end_section=row is every[-2])
    return table


def print_profile(profile: Profile, *, console: Console) -> None:
    """The per-exit table with all that a reader needs beside it: banner, warnings, closure, machine."""
    banner = scripted_text(profile)
    if banner is not None:
        console.print(Panel(Text(banner), border_style="yellow", title="scripted", title_align="left"))
    console.print(profile_table(profile, width=console.width))
    console.print(_facts(_lines(profile, width=console.width)))
    for warning in profile.warnings:
        console.print(_hanging("warning", warning, style="yellow"))


def comparison_table(comparison: Comparison) -> Table:
    """Median latencies side by side, one row per exit and profile that is held against the first."""
    table = _table(
        Text(f"against {comparison.baseline}"), ["profile", "exit", "baseline", "this", "median latency", "accuracy"]
    )
    table.columns[1].justify = table.columns[4].justify = "left"
    table.columns[0].overflow, table.columns[0].no_wrap = "fold", False
    for pair in comparison.pairs:
        shorts = short_names([difference.name for difference in pair.differences])
        for difference, short in zip(pair.differences, shorts, strict=True):
            style = {"slower": "red", "faster": "green"}.get(difference.verdict, "dim")
            table.add_row(
                Text(pair.other if difference is pair.differences[0] else ""),
                Text(short),
                duration(difference.baseline_s),
                duration(difference.other_s),
                Text(difference.text, style=style),
                difference.accuracy_text,
                end_section=difference is pair.differences[-1],
            )
    return table


def print_comparison(comparison: Comparison, *, console: Console) -> None:
    """The comparison's table, then what else differs between the profiles."""
    console.print(comparison_table(comparison))
    for pair in comparison.pairs:
        if pair.changes:
            console.print(Text(f"{pair.other} also differs in", style="bold"))
            table = _table(None, ["", "baseline", "this"])
            for column in table.columns:
                column.justify, column.overflow, column.no_wrap = "left", "fold", False
            for change in pair.changes:
                table.add_row(Text(change.name), Text(change.baseline), Text(change.other))
            console.print(table)
        else:
            console.print(Text(f"{pair.other}: same machine, runtime, network, policy, data and protocol"))
        for note in pair.notes:
            console.print(_hanging("note", note, style="yellow"))
    console.print(Text(comparison.caveat, style="dim"))


def _table(title: Text | None, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        # Text, not a string: the brackets of a unit are no markup.
        table.add_column(Text(heading), justify="left" if index == 0 else "right", no_wrap=True, overflow="ellipsis")
    return table


def _lines(profile: Profile, *, width: int) -> Iterator[Fact]:
    accuracy, speed_up, early, _ = cards(profile)
    yield Fact("stream", f"speed-up {speed_up.value}: {speed_up.detail}")
    yield Fact("", f"{early.value} leave early; accuracy {accuracy.value}: {accuracy.detail}")
    yield Fact("closure", closure_text(profile.closure))
    if profile.energy_closure is not None:
        yield Fact("", closure_text(profile.energy_closure, quantity="energy"))
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


def _hanging(label: str, text: str, *, style: str) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text(label, style=f"bold {style}"), Text(text, style=style))
    return grid


def _runtime(profile: Profile) -> str:
    known = [str(profile.runtime[name]) for name in ("name", "version") if profile.runtime.get(name)]
    return " ".join(known) or "an unnamed runtime"
