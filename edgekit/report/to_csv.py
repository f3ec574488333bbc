"""The per-exit table as CSV: one row per exit and one for the stream, SI units, the unit in the heading."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgekit.errors import MeasurementError
from edgekit.records import Profile
from edgekit.report.files import write_aside
from edgekit.report.tables import Row, rows

__all__ = ["write_csv"]


def write_csv(profiles: Sequence[Profile], path: str | Path) -> Path:
    """Write the figures of one or more profiles. What was not measured is an empty field.

    Raises:
        MeasurementError: there is no profile, or the file cannot be written.
    """
    if not profiles:
        raise MeasurementError(f"{path}: there is no profile to write; measure one with edgekit profile")
    records = [_record(profile, row) for profile in profiles for row in rows(profile)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return write_aside(path, text.getvalue())


def _record(profile: Profile, row: Row) -> dict[str, Any]:
    energy = {f"energy_{name}": value for name, value in msgspec.structs.asdict(row.energy).items()}
    return {
        "network": profile.network,
        "plan": profile.plan,
        "created": profile.created,
        "host": profile.before.host,
        "runtime": profile.runtime.get("name"),
        "policy": profile.policy.get("name"),
        "kind": "stream" if row.stream else "exit",
        "name": row.name,
        "share": row.share,
        "accuracy": row.accuracy,
        "share_accuracy": row.share_accuracy,
        "macs": row.macs,
        **msgspec.structs.asdict(row.latency),
        **energy,
        "scripted": profile.scripted,
    }
