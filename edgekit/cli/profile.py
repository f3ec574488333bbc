"""``edgekit profile``: what each exit costs here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich.console import Console

from edgekit.cli import options, output
from edgekit.records import Profile

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit profile net.edgekit --data test.npz --policy default -o profile.json"

RAW = ("latency_ns", "exits")
"""Per-sample figures, which are in the file and not in ``--json``."""


def command(
    bundle: options.BundlePath,
    data: options.DataSource,
    policy: options.PolicyName = None,
    force: options.Force = False,
    path: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write, raw samples included.")] = Path(
        "profile.json"
    ),
    protocol: Annotated[
        Literal["quick", "standard"], typer.Option("--protocol", help="A first look, or for publication.")
    ] = "quick",
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0.0, help="Measure this long instead of the protocol's time.")
    ] = None,
    meter: Annotated[
        str | None, typer.Option("--meter", help="Of energy, as rapl or replay:power.csv; found if not given.")
    ] = None,
    runtime: options.Runtime = "onnxruntime",
    threads: options.Threads = 1,
    json: options.Json = False,
) -> None:
    """Measure latency, energy and memory of every exit and of the stream that the policy makes of the data."""
    import edgekit
    from edgekit import profiles
    from edgekit.report import print_profile

    settings = {"quick": profiles.QUICK, "standard": profiles.STANDARD}[protocol]
    if seconds is not None:
        settings = replace(settings, name=f"{protocol}, {seconds:g} s", min_seconds=seconds, max_seconds=seconds)
    chosen = options.meter(meter)
    options.find_users_code()
    with (
        output.Bars() as progress,
        edgekit.load(bundle, runtime=runtime, policy=policy, force=force, threads=threads) as session,
    ):
        profile = edgekit.profile(session, data, protocol=settings, meter=chosen, progress=progress)
    profile.save(path)

    def draw(console: Console) -> None:
        print_profile(profile, console=console)
        console.print(f"wrote {path}", soft_wrap=True)

    output.show(_summary(profile, path), as_json=json, draw=draw)


def _summary(profile: Profile, path: Path) -> dict[str, Any]:
    """The profile without its raw samples."""
    known = msgspec.to_builtins(profile)
    parts = [
        {key: value for key, value in part.items() if key not in RAW} for part in (*known["exits"], known["stream"])
    ]
    return {**known, "exits": parts[:-1], "stream": parts[-1], "output": str(path)}
