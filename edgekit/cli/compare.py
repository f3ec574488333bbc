"""``edgekit compare``: profiles side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekit.cli import options, output
from edgekit.records import Profile

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit compare before.json after.json"


def command(
    profiles: Annotated[list[Path], typer.Argument(metavar="PROFILE PROFILE...", help="The first is the baseline.")],
    other_networks: Annotated[
        bool, typer.Option("--other-networks", help="Compare although the networks differ, exits matched by name.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Hold profiles against the first: medians, intervals of the change, and what else differs."""
    from edgekit.report import compare, print_comparison

    comparison = compare([Profile.load(path) for path in profiles], other_networks=other_networks)
    output.show(comparison, as_json=json, draw=lambda console: print_comparison(comparison, console=console))
