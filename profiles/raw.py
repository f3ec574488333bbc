"""All that a measurement has taken so far, raw; what a stopped one left is taken up again from its profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.errors import MeasurementError
from edgekit.measured import MeterFacts, OperatorTime, StageTime, TracedRun, Window
from edgekit.profiles.answers import Answers
from edgekit.profiles.integrate import Series
from edgekit.profiles.latency import Timed, Timings
from edgekit.profiles.paced import Paced
from edgekit.profiles.workloads import STREAM, Workload
from edgekit.records import Profile

__all__ = ["Measured", "require_same", "require_same_meter", "resumed"]

TO_THE_END = "meter-to-the-end"
"""The rule that is broken where a meter failed and another part can measure what it left."""
SAME_METER = ("name", "quantity", "scope", "covers", "parts", "replay")
"""What makes a meter the same one. Steps may be told by the voltage of the moment."""


@dataclass(kw_only=True)
class Measured:
    """Raw, added to as it comes.

    Attributes:
        timings: latencies.
        first_run_s: of the session's first inference; ``None`` when it was not the first.
        peak_rss_bytes: after the latencies.
        steady_rss_bytes: likewise.
        stages: where the time goes; empty before it was looked at.
        traces: some inferences taken apart.
        tracing_overhead: of taking apart: traced over untraced.
        operators: of every stage.
        facts: of the meter; ``None`` without one.
        no_energy: why there is none, or why it ends early.
        windows: of energy.
        costs: of reading the meter, for each window.
        power: readings over time, in watts.
        readings: of the meter in this part of the measurement, as they were.
        paced: rates done.
        answers: on the whole data; ``None`` before that.
        parts: times that the measurement was begun or resumed.
        zero_s: where this part's times begin.
    """

    timings: Timings
    first_run_s: float | None = None
    peak_rss_bytes: int | None = None
    steady_rss_bytes: int | None = None
    stages: tuple[StageTime, ...] = ()
    traces: tuple[TracedRun, ...] = ()
    tracing_overhead: float | None = None
    operators: tuple[OperatorTime, ...] = ()
    facts: MeterFacts | None = None
    no_energy: str = ""
    windows: list[Window] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    power: Series = field(default_factory=lambda: Series(np.zeros(0), np.zeros(0)))
    readings: Series = field(default_factory=lambda: Series(np.zeros(0), np.zeros(0)))
    paced: list[Paced] = field(default_factory=list)
    answers: Answers | None = None
    parts: int = 1
    zero_s: float = 0.0


def resumed(profile: Profile, works: Sequence[Workload]) -> Measured:
    """What a measurement has that was stopped, or whose meter failed, to be added to.

    Rates that the meter left without energy are measured again.

    Args:
        profile: as it was saved.
        works: of the same plan.

    Raises:
        MeasurementError: nothing is left to measure, or its raw samples are not those of the plan.
    """
    if profile.complete and TO_THE_END not in [check.rule for check in profile.broken]:
        raise MeasurementError(f"the profile of {profile.created} is complete; there is nothing to resume")
    timings = Timings.nothing(works)
    raw: dict[str, Any] = {each.name: each for each in profile.exits}
    raw |= {each.name: each for each in profile.paths} | {STREAM: profile.stream}
    if set(raw) != set(timings.taken):
        raise MeasurementError("the profile has other exits or paths than the network; measure anew")
    for work in works:
        found = raw[work.name]
        count = len(found.latency_ns)
        last = len(profile.exits) - 1 if work.exit is None else work.exit
        exits = profile.stream.exits if work.name == STREAM else (last,) * count
        samples = (profile.stream.samples or (0,) * count) if work.name == STREAM else (0,) * count
        device = getattr(found, "device_ns", ()) or (None,) * count
        timings.taken[work.name] = [Timed(*each) for each in zip(found.latency_ns, samples, exits, device, strict=True)]
    timings.rounds, timings.seconds = profile.settings["rounds"], profile.settings["timed_s"]
    timings.reference_ns = list(profile.reference_ns)
    timings.steady = next((check.passed for check in profile.checks if check.rule == "steady-warm-up"), None)
    ends = [0.0, *(each.stop_s for each in profile.windows), *profile.power.times_s]
    ends += [each.start_s + each.total_ns * 1e-9 for each in profile.traces]
    paced_windows = {each.name: each for each in profile.windows if each.kind == "paced"}
    return Measured(
        timings=timings,
        first_run_s=profile.first_run_s,
        stages=profile.stages,
        traces=profile.traces,
        tracing_overhead=profile.settings.get("tracing_overhead"),
        operators=profile.operators,
        windows=list(profile.windows),
        costs=list(profile.settings.get("reading_costs", ())),
        power=Series(np.array(profile.power.times_s), np.array(profile.power.power_w)),
        paced=[
            Paced(
                rate_hz=each.rate_hz,
                latency_ns=list(each.latency_ns),
                late=each.late,
                window=paced_windows.get(f"stream at {each.rate_hz:g} Hz"),
                failure=each.energy.reason or "",
            )
            for each in profile.paced
            if profile.meter is None or f"stream at {each.rate_hz:g} Hz" in paced_windows
        ],
        parts=profile.settings.get("parts", 1) + 1,
        zero_s=max(ends) + 1.0,
    )


def require_same(profile: Profile, now: Mapping[str, Any]) -> None:
    """Refuse to add to a measurement of something else.

    Args:
        profile: the earlier part.
        now: attributes of the profile, dotted, with what they are now.

    Raises:
        MeasurementError: something differs; it is named.
    """
    for name, value in now.items():
        before: Any = profile
        for part in name.split("."):
            before = before.get(part) if isinstance(before, Mapping) else getattr(before, part)
        if before != value:
            raise MeasurementError(
                f"the measurement cannot be resumed: {name} was {_short(before)} and is {_short(value)}; measure anew"
            )


def require_same_meter(profile: Profile, now: MeterFacts | None) -> None:
    """Refuse to add to energy that another meter measured.

    Args:
        profile: the earlier part.
        now: facts of the meter; ``None`` without one.

    Raises:
        MeasurementError: the earlier part's is another one.
    """
    before = profile.meter
    if before is not None and any(getattr(before, name) != getattr(now, name, None) for name in SAME_METER):
        raise MeasurementError(f"the measurement cannot be resumed: meter '{before.name}' was used; give it again")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
