"""How long and how often is measured, and how well the parts must agree."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from edgekit.errors import MeasurementError

__all__ = ["PUBLISHABLE", "QUICK", "STANDARD", "Protocol", "ProtocolName", "as_protocol"]

ProtocolName = Literal["quick", "standard", "publishable"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Settings of a measurement.

    A round runs every forced exit and every path through gates once, and the stream as many times as there are exits.
    Rounds go on until there are ``min_samples`` and ``min_seconds``, then until the stream has passed all the data
    once and medians are known as well as is asked for, at most until ``max_seconds``.

    Attributes:
        name: what a report calls it.
        warmup_rounds: at least this many rounds first, thrown away (Zeus: 10 iterations).
        warmup_s: and at least this long (trtexec: 200 ms).
        max_warmup_s: warm-up goes on until two stretches in a row agree within 2 %, at most so long.
        min_samples: of every exit.
        min_seconds: of rounds, warm-up not counted (hyperfine, trtexec: 3 s).
        max_seconds: no longer than this for the sake of passing all the data, or of medians.
        median_within: share of an exit's median that half of its interval may be; where a machine's speed wanders, only
            more time tells a median as well, at most five times ``min_seconds``. 0 does not ask.
        closure: how far the stream's mean may be from what its exits explain, as a share.
        stages_s: of inferences that are taken apart, stage by stage; 0 for none.
        paced_hz: rates at which the stream is run as well.
        paced_s: how long, at each; longer where a meter's 100 updates take longer, as for windows and idle baselines.
        energy_window_s: repeats of one exit between two readings (MLPerf Tiny: 10 s); 0 for no energy.
        energy_windows: how many windows for each exit, the median reported (MLPerf Tiny: 5).
        slope: whether windows of twice and three times as many repeats follow, whose slope must agree.
        idle_s: idle baseline before, and again after, the windows; 0 for none, and then no net energy.
        cooldown_s: longest rest before a window, for the device to reach the temperature it began with.

    Raises:
        MeasurementError: a setting is not positive.
    """

    name: str = "custom"
    warmup_rounds: int = 10
    warmup_s: float = 0.2
    max_warmup_s: float = 5.0
    min_samples: int = 100
    min_seconds: float = 3.0
    max_seconds: float = 30.0
    median_within: float = 0.0
    closure: float = 0.10
    stages_s: float = 1.0
    paced_hz: tuple[float, ...] = ()
    paced_s: float = 10.0
    energy_window_s: float = 10.0
    energy_windows: int = 1
    slope: bool = False
    idle_s: float = 10.0
    cooldown_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name in ("min_samples", "energy_windows") else 0
            if field.name not in ("name", "paced_hz") and not value >= least:
                raise MeasurementError(f"protocol: {field.name} must be at least {least}, not {value}")
        if not all(rate > 0 for rate in self.paced_hz):
            raise MeasurementError(f"protocol: paced_hz must be positive rates, not {self.paced_hz}")


QUICK = Protocol(name="quick")
"""A first look: seconds, and no 99th percentile unless the network is fast."""

STANDARD = Protocol(
    name="standard",
    max_warmup_s=30.0,
    min_samples=1024,
    min_seconds=60.0,
    max_seconds=600.0,
    median_within=0.015,
    closure=0.03,
    stages_s=5.0,
    paced_hz=(10.0, 30.0),
    energy_windows=5,
    slope=True,
    cooldown_s=2.0,
)
"""For decisions: at least 1024 inferences of each row and 60 s, as MLPerf Mobile asks; medians to 1.5 %."""

PUBLISHABLE = Protocol(
    name="publishable",
    max_warmup_s=120.0,
    min_samples=6636,
    min_seconds=600.0,
    max_seconds=1800.0,
    median_within=0.01,
    closure=0.03,
    stages_s=20.0,
    paced_hz=(10.0, 30.0),
    paced_s=60.0,
    energy_windows=5,
    slope=True,
    idle_s=30.0,
    cooldown_s=10.0,
)
"""For publication: 600 s, as MLPerf Inference asks of edge devices, and enough of each row for a 99.9th percentile."""


def as_protocol(protocol: Protocol | ProtocolName) -> Protocol:
    """A protocol by name, or as given.

    Raises:
        MeasurementError: no protocol has that name.
    """
    if isinstance(protocol, Protocol):
        return protocol
    named = {each.name: each for each in (QUICK, STANDARD, PUBLISHABLE)}
    if protocol not in named:
        raise MeasurementError(
            f"no protocol is called {protocol!r}: use {', '.join(get_args(ProtocolName))}, or a Protocol"
        )
    return named[protocol]
