"""Profiles as CSV: a line per exit, stream, path, rate and stage, or per inference; SI, the unit ends the heading."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgekit.errors import MeasurementError
from edgekit.measured import Energy, Interval, LatencySummary
from edgekit.records import Profile
from edgekit.report.files import write_aside
from edgekit.report.sheets import rate_text
from edgekit.report.tables import STREAM, rows

__all__ = ["write_csv", "write_raw_csv"]


def write_csv(profiles: Sequence[Profile], path: str | Path) -> Path:
    """Write the figures of one or more profiles. What was not measured is an empty field.

    Raises:
        MeasurementError: there is no profile, or the file cannot be written.
    """
    if not profiles:
        raise MeasurementError(f"{path}: there is no profile to write; measure one with edgekit profile")
    records = [record for profile in profiles for record in _records(profile)]
    return _write(path, records)


def write_raw_csv(profiles: Sequence[Profile], path: str | Path) -> Path:
    """Write every timed inference, for an analysis of one's own: one line each, in the order they were taken.

    Columns: network, created, kind (exit, stream, path, paced), name, sample (number of the inference in its row),
    latency_s, exit (that it left at; empty on a path through gates) and device_s (by the device's own clock).

    Raises:
        MeasurementError: there is no profile, or the file cannot be written.
    """
    if not profiles:
        raise MeasurementError(f"{path}: there is no profile to write; measure one with edgekit profile")
    return _write(path, [record for profile in profiles for record in _raw(profile)])


def _raw(profile: Profile) -> Iterator[dict[str, Any]]:
    for kind, name, latency_ns, exits, device_ns in _series(profile):
        for number, taken in enumerate(latency_ns):
            yield {
                "network": profile.network,
                "created": profile.created,
                "kind": kind,
                "name": name,
                "sample": number,
                "latency_s": _seconds(taken),
                "exit": exits[number] if number < len(exits) else None,
                "device_s": _seconds(device_ns[number]) if number < len(device_ns) else None,
            }


_Series = tuple[str, str, tuple[int, ...], Sequence[str], tuple[int, ...]]
"""Kind, name, latencies and the exit of each, and the same on the device's clock; nanoseconds."""


def _series(profile: Profile) -> Iterator[_Series]:
    names = [item.name for item in profile.exits]
    for item in profile.exits:
        yield "exit", item.name, item.latency_ns, [item.name] * len(item.latency_ns), item.device_ns
    stream = profile.stream
    yield "stream", STREAM, stream.latency_ns, [names[index] for index in stream.exits], stream.device_ns
    for path in profile.paths:
        yield "path", path.name, path.latency_ns, (), ()
    for paced in profile.paced:
        yield "paced", f"stream {rate_text(paced.rate_hz)}", paced.latency_ns, (), ()


def _seconds(nanoseconds: int) -> str:
    """Exact: a float would add digits that no clock told."""
    return f"{nanoseconds // 10**9}.{nanoseconds % 10**9:09d}"


def _write(path: str | Path, records: Sequence[dict[str, Any]]) -> Path:
    text = io.StringIO()
    headings = dict.fromkeys(heading for record in records for heading in record)
    writer = csv.DictWriter(text, list(headings), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return write_aside(path, text.getvalue())


def _records(profile: Profile) -> Iterator[dict[str, Any]]:
    for row in rows(profile):
        kind = "stream" if row.stream else "exit"
        yield _record(profile, kind, row.name, row.latency, row.energy) | {
            "share": row.share,
            "accuracy": row.accuracy,
            "share_accuracy": row.share_accuracy,
            "macs": row.macs,
            **_ends("added", "s", row.added_s),
            **_ends("added", "j", row.added_j),
            "device_median_s": None if row.device is None else row.device.median_s,
            "device_p90_s": None if row.device is None else row.device.p90_s,
        }
    for path in profile.paths:
        yield _record(profile, "path", path.name, path.latency, path.energy) | {
            "macs": path.macs,
            **_ends("saved", "s", path.saved_s),
        }
    for paced in profile.paced:
        name = f"stream {rate_text(paced.rate_hz)}"
        yield _record(profile, "paced", name, paced.latency, paced.energy) | {
            "rate_hz": paced.rate_hz,
            "begun_late": paced.late,
        }
    for stage in profile.stages:
        yield _conditions(profile, "stage", stage.name) | {
            "share": stage.share,
            **_ends("compute", "s", stage.compute),
            **_ends("head", "s", stage.head),
            **_ends("decision", "s", stage.decision),
            **_ends("boundary", "s", stage.boundary),
            **_ends("relative", "ratio", stage.relative),
        }


def _record(profile: Profile, kind: str, name: str, latency: LatencySummary, energy: Energy) -> dict[str, Any]:
    spent = {f"energy_{key}": value for key, value in msgspec.structs.asdict(energy).items()}
    return _conditions(profile, kind, name) | msgspec.structs.asdict(latency) | spent


def _ends(name: str, unit: str, found: Interval | None) -> dict[str, float | None]:
    """``head_s``, ``head_low_s`` and ``head_high_s``; as everywhere, the unit ends the name."""
    value, low, high = (None, None, None) if found is None else (found.value, found.low, found.high)
    return {f"{name}_{unit}": value, f"{name}_low_{unit}": low, f"{name}_high_{unit}": high}


def _conditions(profile: Profile, kind: str, name: str) -> dict[str, Any]:
    return {
        "network": profile.network,
        "plan": profile.plan,
        "created": profile.created,
        "host": profile.before.host,
        "runtime": profile.runtime.get("name"),
        "policy": profile.policy.get("name"),
        "scripted": profile.scripted,
        "valid": profile.valid if profile.checks else None,
        "complete": profile.complete,
        "kind": kind,
        "name": name,
    }
