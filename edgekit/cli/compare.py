"""``edgekit compare``: profiles side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekit.cli import options, output
from edgekit.records import Profile

__all__ = ["EXAMPLE", "WORSE", "command"]

EXAMPLE = "edgekit compare before.json after.json --tolerance 3%"
WORSE = 3
"""Exit code when something got worse."""


def command(
    profiles: Annotated[list[Path], typer.Argument(metavar="PROFILE PROFILE...", help="The first is the baseline.")],
    tolerance: Annotated[
        str, typer.Option("--tolerance", help="What two runs on one machine may differ by, as 5% or 0.05.")
    ] = "5%",
    confidence: Annotated[
        str, typer.Option("--confidence", help="That all intervals hold at once, as 95% or 0.95.")
    ] = "95%",
    other_networks: Annotated[
        bool, typer.Option("--other-networks", help="Compare although the networks differ, exits matched by name.")
    ] = False,
    other_hosts: Annotated[
        bool, typer.Option("--other-hosts", help="Compare although hosts, processors or runtimes differ.")
    ] = False,
    invalid: Annotated[
        bool, typer.Option("--invalid", help="Compare although a profile is incomplete or broke a rule.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Hold profiles against the first. Exit code: 0 when nothing got worse, 3 when something did, 1 for errors."""
    from edgekit.report import compare, print_comparison

    comparison = compare(
        [Profile.load(path) for path in profiles],
        other_networks=other_networks,
        other_hosts=other_hosts,
        invalid=invalid,
        tolerance=options.share(tolerance, option="--tolerance"),
        confidence=options.share(confidence, option="--confidence"),
    )
    output.show(comparison, as_json=json, draw=lambda console: print_comparison(comparison, console=console))
    if comparison.worse:
        raise typer.Exit(WORSE)
