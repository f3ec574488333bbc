"""``edgekit profile``: what each exit costs here."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer
from rich.console import Console

from edgekit.artifacts import FLOAT
from edgekit.cli import options, output
from edgekit.errors import MeasurementError
from edgekit.records import Profile

if TYPE_CHECKING:
    from edgekit.profiles import Protocol

__all__ = ["EXAMPLE", "command"]

EXAMPLE = "edgekit profile net.edgekit --data test.npz --protocol standard -o profile.json"

RAW = ("traces", "windows", "power")
RAW_OF_A_ROW = ("latency_ns", "device_ns", "exits", "samples")
"""Per-sample figures and those over time, which are in the file and not in ``--json``."""


def command(
    bundle: options.BundlePath,
    data: options.DataSource,
    policy: options.PolicyName = None,
    force: options.Force = False,
    path: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write, raw samples included.")] = Path(
        "profile.json"
    ),
    protocol: Annotated[
        Literal["quick", "standard", "publishable"],
        typer.Option("--protocol", help="A first look (3 s), for decisions (60 s), for publication (600 s)."),
    ] = "quick",
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0.0, help="Measure this long instead of the protocol's time.")
    ] = None,
    meter: Annotated[
        str | None, typer.Option("--meter", help="Of energy, as rapl or replay:power.csv; found if not given.")
    ] = None,
    operators: Annotated[
        bool, typer.Option("--operators", help="Time every operator, by the runtime's own profiler.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the stopped measurement in the output.")] = False,
    runtime: options.Runtime = "onnxruntime",
    threads: options.Threads = 1,
    precision: options.Precision = FLOAT,
    json: options.Json = False,
) -> None:
    """Measure latency, energy and memory of every exit and of the stream that the policy makes of the data."""
    import edgekit
    from edgekit import profiles

    settings = {"quick": profiles.QUICK, "standard": profiles.STANDARD, "publishable": profiles.PUBLISHABLE}[protocol]
    if seconds is not None:
        settings = _lasting(settings, seconds)
    earlier = Profile.load(path) if resume else None
    _require_writable(path)
    chosen = options.meter(meter)
    options.find_users_code()
    try:
        with (
            output.Bars() as progress,
            edgekit.load(
                bundle,
                **options.runtime_options(runtime),
                policy=policy,
                force=force,
                threads=threads,
                precision=precision,
            ) as session,
        ):
            profile = edgekit.profile(
                session,
                data,
                protocol=settings,
                meter=chosen,
                operators=operators,
                resume=earlier,
                keep=partial(_keep, path),
                progress=progress,
            )
    except profiles.ProfileStopped as stopped:
        _save(stopped.profile, path, json=json)
        raise KeyboardInterrupt(
            f"stopped; what there is lies in {path}, and the same command with --resume goes on"
        ) from stopped
    _save(profile, path, json=json)
    _show(profile, path, json=json, saved=True)


def _save(profile: Profile, path: Path, *, json: bool) -> None:
    """Save; where that fails, as on a full disk, show the figures, which would be lost.

    Raises:
        MeasurementError: it failed.
    """
    try:
        profile.save(path)
    except MeasurementError:
        _show(profile, path, json=json, saved=False)
        raise


def _keep(path: Path, found: Profile) -> None:
    """Save what there is; where that fails, as on a full disk, the measurement goes on, and the last save will tell."""
    with suppress(MeasurementError):
        found.save(path)


def _lasting(protocol: Protocol, seconds: float) -> Protocol:
    """The protocol with another time for latency, and no more than that for what comes beside it."""
    return replace(
        protocol,
        name=f"{protocol.name}, {seconds:g} s",
        min_seconds=seconds,
        max_seconds=seconds,
        median_within=0.0,
        max_warmup_s=min(protocol.max_warmup_s, seconds),
        stages_s=min(protocol.stages_s, seconds),
        paced_s=min(protocol.paced_s, seconds),
    )


def _require_writable(path: Path) -> None:
    """Refuse before the measurement what could not be written after it.

    Raises:
        MeasurementError: there is no such folder, it is not ours, or a folder lies where the file would.
    """
    if path.is_dir():
        raise MeasurementError(f"{path}: the profile could not be written (it is a folder); give a file as -o")
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.touch()
        os.unlink(aside)
    except OSError as error:
        raise MeasurementError(
            f"{path}: the profile could not be written ({error.strerror}); give another -o"
        ) from error


def _show(profile: Profile, path: Path, *, json: bool, saved: bool) -> None:
    from edgekit.report import print_profile

    def draw(console: Console) -> None:
        print_profile(profile, console=console)
        if saved:
            console.print(f"wrote {path}", soft_wrap=True)

    output.show(_summary(profile, path if saved else None), as_json=json, draw=draw)


def _summary(profile: Profile, path: Path | None) -> dict[str, Any]:
    """The profile without its raw samples."""
    known = {key: value for key, value in msgspec.to_builtins(profile).items() if key not in RAW}
    for name in ("exits", "paths", "paced"):
        known[name] = [_without_raw(part) for part in known[name]]
    stream = _without_raw(known["stream"])
    return {**known, "stream": stream, "valid": profile.valid, "output": None if path is None else str(path)}


def _without_raw(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in RAW_OF_A_ROW}
