"""What is not the same in two profiles besides their figures: machine, runtime, network, policy, data, protocol."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from edgekit.records import Profile
from edgekit.report.formats import NONE

__all__ = ["Change", "changes", "machine_changes"]

_STEADY = (
    "host", "system", "machine", "processor", "cores", "affinity", "memory_bytes", "governors",
    "frequency_limits_hz", "core_types", "isolated", "boost", "clocks_fixed", "power_mode", "power_source", "container",
    "versions",
)  # fmt: skip
"""What of the machine is the same in two runs unless somebody changed it."""
_OUTCOMES = {"created", "rounds", "timed_s", "tracing_overhead", "parts", "reading_costs", "idle_w"}
"""What a run found, among its settings and elsewhere."""


@dataclass(frozen=True)
class Change:
    """Something that is not the same in two profiles."""

    name: str
    baseline: str
    other: str


def machine_changes(first: Profile, other: Profile) -> tuple[Change, ...]:
    """Why two profiles are not of one machine: host, processor, runtime or device; empty when they are."""
    mine, theirs = dict(_machine(first)), dict(_machine(other))
    return _differing(mine, theirs)


def _machine(profile: Profile) -> Iterator[tuple[str, str]]:
    yield "host", profile.before.host
    yield "processor", profile.before.processor or profile.before.machine
    yield "runtime", str(profile.runtime.get("name", NONE))
    yield "device", str(profile.runtime.get("device", NONE))


def changes(first: Profile, other: Profile) -> tuple[Change, ...]:
    """Everything that differs and that a fair comparison holds constant."""
    return _differing(dict(_conditions(first)), dict(_conditions(other)))


def _differing(mine: Mapping[str, str], theirs: Mapping[str, str]) -> tuple[Change, ...]:
    return tuple(
        Change(name, mine.get(name, NONE), theirs.get(name, NONE))
        for name in dict.fromkeys((*mine, *theirs))
        if mine.get(name) != theirs.get(name)
    )


def _conditions(profile: Profile) -> Iterator[tuple[str, str]]:
    machine = msgspec.to_builtins(profile.before)
    yield from _flat("network", {"name": profile.network, "plan": profile.plan[:12]})
    yield from _flat("stage", {name: digest[:12] for name, digest in profile.artifacts.items()})
    yield from _flat("runtime", profile.runtime)
    yield from _flat("policy", {name: value for name, value in profile.policy.items() if name != "provenance"})
    provenance = profile.policy.get("provenance") or {}
    yield from _flat("calibration", {name: provenance.get(name) for name in ("method", "data_sha256", "settings")})
    yield from _flat("data", {"source": profile.data, "sha256": profile.data_sha256[:12], "samples": profile.samples})
    yield from _flat("protocol", profile.settings)
    yield from _flat("machine", {name: machine.get(name) for name in _STEADY})
    if profile.meter is not None:
        meter = msgspec.to_builtins(profile.meter)
        yield from _flat("meter", {name: meter[name] for name in ("name", "quantity", "covers", "parts")})


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _OUTCOMES:
                yield from _flat(f"{prefix} {name}", item)
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(map(_text, value))
    elif value is not None:
        yield prefix, _text(value)


def _text(value: Any) -> str:
    # JSON has no infinity: a threshold that nobody passes is read back as null. Seven digits are those of a float32.
    if value is None or value == math.inf:
        return "never"
    return f"{value:.7g}" if isinstance(value, float) else str(value)
