"""``edgekit report``: profiles to HTML and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edgekit.cli import options, output
from edgekit.records import Profile

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit report profile.json -o report.html --csv report.csv"


def command(
    profiles: Annotated[list[Path], typer.Argument(metavar="PROFILE...", help="JSON files of edgekit profile.")],
    path: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")] = Path("report.html"),
    csv: Annotated[Path | None, typer.Option("--csv", help="CSV file to write as well: a line per exit.")] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading; the network's name if not given.")] = None,
    json: options.Json = False,
) -> None:
    """Write a report that stands on its own; several profiles are held against the first."""
    from edgekit.report import print_profile, write_csv, write_html

    loaded = [Profile.load(each) for each in profiles]
    write_html(loaded, path, title=title)
    if csv is not None:
        write_csv(loaded, csv)

    def draw(console: Console) -> None:
        for profile in loaded:
            print_profile(profile, console=console)
        if csv is not None:
            console.print(f"wrote {csv}", soft_wrap=True)
        console.print(f"report: {path.resolve()}", soft_wrap=True)

    output.show({"html": str(path), "csv": str(csv) if csv is not None else None}, as_json=json, draw=draw)
