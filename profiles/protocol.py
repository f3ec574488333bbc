"""How long and how often is measured."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from edgekit.errors import MeasurementError

__all__ = ["QUICK", "STANDARD", "Protocol", "as_protocol"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Settings of a measurement. A round runs every forced exit once and the stream as many times as there are exits.

    Rounds go on until there are ``min_samples`` and ``min_seconds``, then until the stream has passed all the data
    once, at most until ``max_seconds``.

    Attributes:
        name: what a report calls it.
        warmup_rounds: at least this many rounds first, thrown away (Zeus: 10 iterations).
        warmup_s: and at least this long (trtexec: 200 ms).
        min_samples: of every exit.
        min_seconds: of rounds, warm-up not counted (hyperfine, trtexec: 3 s).
        max_seconds: no longer than this for the sake of passing all the data.
        energy_window_s: repeats of one exit between two readings (MLPerf Tiny: 10 s); 0 for no energy.
        energy_windows: how many windows for each exit, the median reported (MLPerf Tiny: 5).
        idle_s: idle baseline before, and again after, the windows; 0 for none, and then no net energy.

    Raises:
        MeasurementError: a setting is not positive.
    """

    name: str = "custom"
    warmup_rounds: int = 10
    warmup_s: float = 0.2
    min_samples: int = 100
    min_seconds: float = 3.0
    max_seconds: float = 30.0
    energy_window_s: float = 10.0
    energy_windows: int = 1
    idle_s: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name in ("min_samples", "energy_windows") else 0
            if field.name != "name" and not value >= least:
                raise MeasurementError(f"protocol: {field.name} must be at least {least}, not {value}")


QUICK = Protocol(name="quick")
"""A first look: seconds, and no 99th percentile unless the network is fast."""

STANDARD = Protocol(name="standard", min_samples=1024, min_seconds=60.0, max_seconds=600.0, energy_windows=5)
"""For publication: at least 1024 inferences and 60 s, as MLPerf Mobile asks."""


def as_protocol(protocol: Protocol | Literal["quick", "standard"]) -> Protocol:
    """A protocol by name, or as given.

    Raises:
        MeasurementError: no protocol has that name.
    """
    if isinstance(protocol, Protocol):
        return protocol
    named = {each.name: each for each in (QUICK, STANDARD)}
    if protocol not in named:
        raise MeasurementError(f"no protocol is called {protocol!r}: use {', '.join(named)}, or a Protocol")
    return named[protocol]
