"""How tables look in a terminal: headings, names as long as fit, labels with hanging text."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgekit.report.sheets import Sheet
from edgekit.report.tables import short_names

__all__ = ["NAME_LENGTHS", "fits", "hanging", "headed", "sheet_table"]

NAME_LENGTHS = (40, 28, 22, 16)
"""Characters of names, as a terminal has room."""


def headed(title: str | None, headings: Sequence[str]) -> Table:
    """An empty table; names to the left, figures to the right."""
    table = Table(
        title=None if title is None else Text(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, heading in enumerate(headings):
        # Text, not a string: the brackets of a unit are no markup.
        table.add_column(Text(heading), justify="left" if index == 0 else "right", no_wrap=True, overflow="ellipsis")
    return table


def sheet_table(sheet: Sheet, *, width: int, named: int = 1) -> Table:
    """With as long names as fit, and then with as many of its details.

    Args:
        sheet: the table.
        width: characters.
        named: so many columns from the left hold names.
    """
    for most in NAME_LENGTHS:
        for count in range(len(sheet.details) + 1):
            headings, lines = sheet.without(sheet.details[:count])
            shorts = [_shorts([line[column] for line in lines], most) for column in range(named)]
            table = headed(sheet.title, headings)
            for line in lines:
                names = [short[name] for short, name in zip(shorts, line, strict=False)]
                table.add_row(*map(Text, (*names, *line[named:])))
            if fits(table, width):
                return table
    return table


def _shorts(names: Sequence[str], most: int) -> dict[str, str]:
    every = list(dict.fromkeys(names))
    return dict(zip(every, short_names(every, most=most), strict=True))


def fits(table: Table, width: int) -> bool:
    """Measured on a console of its own: the table's width when nothing is squeezed."""
    return Console(width=10_000).measure(table).maximum <= width


def hanging(label: str, text: str, *, style: str) -> Table:
    """A label, and beside it a text that wraps."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text(label, style=f"bold {style}"), Text(text, style=style))
    return grid
