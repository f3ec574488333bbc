"""``edgekit report``: profiles to HTML, CSV, a Perfetto trace and MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edgekit.cli import options, output
from edgekit.errors import InputError
from edgekit.records import Profile

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit report profile.json -o report.html --csv report.csv"


def command(
    profiles: Annotated[list[Path], typer.Argument(metavar="PROFILE...", help="JSON files of edgekit profile.")],
    path: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")] = Path("report.html"),
    csv: Annotated[Path | None, typer.Option("--csv", help="CSV file to write as well: a line per exit.")] = None,
    raw_csv: Annotated[Path | None, typer.Option("--raw-csv", help="CSV file with every timed inference.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Perfetto trace to write: traced inferences, windows, power.")
    ] = None,
    mlflow: Annotated[bool, typer.Option("--mlflow", help="Log figures and files to MLflow as well.")] = False,
    title: Annotated[str | None, typer.Option("--title", help="Heading; the network's name if not given.")] = None,
    json: options.Json = False,
) -> None:
    """Write a report that stands on its own; several profiles are held against the first."""
    from edgekit.report import print_profile, write_csv, write_html, write_raw_csv, write_trace

    loaded = [Profile.load(each) for each in profiles]
    if trace is not None and len(loaded) > 1:
        raise InputError(f"--trace {trace}: a trace is of one profile, and {len(loaded)} are given; name one")
    write_html(loaded, path, title=title)
    wrote = {"html": path}
    if csv is not None:
        wrote["csv"] = write_csv(loaded, csv)
    if raw_csv is not None:
        wrote["raw_csv"] = write_raw_csv(loaded, raw_csv)
    if trace is not None:
        wrote["trace"] = write_trace(loaded[0], trace)
    runs = _log(loaded, profiles, list(wrote.values())) if mlflow else []

    def draw(console: Console) -> None:
        for profile in loaded:
            print_profile(profile, console=console)
        for kind, file in wrote.items():
            if kind != "html":
                console.print(f"wrote {file}", soft_wrap=True)
        for run in runs:
            console.print(f"MLflow run {run}", soft_wrap=True)
        console.print(f"report: {path.resolve()}", soft_wrap=True)

    files = {kind: str(wrote[kind]) if kind in wrote else None for kind in ("html", "csv", "raw_csv", "trace")}
    output.show(files | {"mlflow": runs}, as_json=json, draw=draw)


def _log(loaded: list[Profile], sources: list[Path], wrote: list[Path]) -> list[str]:
    """One MLflow run for each profile, with its file; what was written of all of them goes with each."""
    from edgekit.report import log_to_mlflow

    return [log_to_mlflow(profile, artifacts=(source, *wrote)) for profile, source in zip(loaded, sources, strict=True)]
