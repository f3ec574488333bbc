"""Figures of a profile and how sure they are. SI units; what was not measured is ``None`` with a reason beside it."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = [
    "Check",
    "Closure",
    "Energy",
    "Interval",
    "LatencySummary",
    "MeterFacts",
    "OperatorTime",
    "PowerTrace",
    "Span",
    "StageTime",
    "TracedRun",
    "Window",
]


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """A figure with the ends of its confidence interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def spans_zero(self) -> bool:
        """Whether the sign is not known."""
        return self.low <= 0 <= self.high


class LatencySummary(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of latency samples, in seconds. A percentile is ``None`` with fewer samples than it needs.

    Attributes:
        samples: how many.
        min_s: smallest.
        median_s: middle.
        mean_s: arithmetic mean.
        sd_s: standard deviation.
        p90_s: conservative order statistic; needs 64 samples (MLPerf early stopping, 99 % confidence).
        p95_s: likewise; needs 130.
        p99_s: likewise; needs 662 samples.
        p999_s: likewise; needs 6636.
        median_low_s: lower end of the interval of the median.
        median_high_s: upper end.
        mean_low_s: lower end of the bootstrap interval of the mean.
        mean_high_s: upper end.
        p90_low_s: lower end of the interval of the 90th percentile; ``None`` where there is none.
        p90_high_s: upper end.
        confidence: of the intervals.
        outliers: samples beyond Tukey's 3 IQR fences; counted and kept.
        far_from_median: samples whose distance from the median is over 14.8 times the median distance (hyperfine).
        independent: independent samples that these are worth to a median; fewer than ``samples`` where they drift.
    """

    samples: int
    min_s: float
    median_s: float
    mean_s: float
    sd_s: float
    p90_s: float | None
    p99_s: float | None
    median_low_s: float
    median_high_s: float
    mean_low_s: float
    mean_high_s: float
    confidence: float
    outliers: int
    p95_s: float | None = None
    p999_s: float | None = None
    p90_low_s: float | None = None
    p90_high_s: float | None = None
    far_from_median: int | None = None
    independent: float | None = None


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Energy of one inference in joules, or why there is none.

    Attributes:
        gross_j: median over the windows; ``None`` when it could not be measured.
        low_j: lower end of its interval: the scatter of the windows and what the sensor leaves open; ``None`` with
            fewer than three windows.
        high_j: upper end.
        net_j: gross less idle power times latency; ``None`` without an idle baseline.
        net_low_j: lower end of its interval, in which idle power lies between the baselines before and after, what the
            sensor leaves open in those included.
        net_high_j: upper end.
        slope_j: joules for each further inference, from windows of N, 2N and 3N; ``None`` where that was not asked.
        method: ``"counter"``, ``"integrated"`` (samples of power) or ``"replay"``.
        scope: what the figure covers, in words.
        meter: name.
        windows: how many.
        window_s: length of the middle one.
        inferences: how many it held.
        reason: why there is no figure, with what would fix it.
    """

    gross_j: float | None = None
    low_j: float | None = None
    high_j: float | None = None
    net_j: float | None = None
    net_low_j: float | None = None
    net_high_j: float | None = None
    slope_j: float | None = None
    method: str = ""
    scope: str = ""
    meter: str = ""
    windows: int = 0
    window_s: float | None = None
    inferences: int | None = None
    reason: str | None = None


class MeterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a meter says of itself.

    Attributes:
        name: it is registered by.
        quantity: what one reading holds: ``"energy"``, joules since it was opened, or ``"power"``, watts now.
        scope: ``"socket"``, ``"gpu"``, ``"module"``, ``"board"``, ``"wall"``, ``"battery"``, ``"device"``, or
            ``"recording"``.
        covers: what that is here, in words, as ``"processor packages and DRAM"``.
        parts: rails, zones or channels whose sum it is.
        resolution: what a reading may be off by for its steps alone, those of all parts together, in joules or watts;
            ``None`` where nobody tells.
        update_interval_s: how often the sensor has something new; ``None`` where nobody tells.
        replay: whether it plays a recording.
    """

    name: str
    quantity: Literal["energy", "power"]
    scope: str
    covers: str
    parts: tuple[str, ...] = ()
    resolution: float | None = None
    update_interval_s: float | None = None
    replay: bool = False

    @property
    def unit(self) -> str:
        """Of a reading and of the resolution: ``"J"`` or ``"W"``."""
        return "J" if self.quantity == "energy" else "W"

    @property
    def method(self) -> str:
        """How a window's joules are found: ``"counter"``, ``"integrated"`` or ``"replay"``."""
        return "replay" if self.replay else "counter" if self.quantity == "energy" else "integrated"


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of time in which one thing was done over and over.

    Attributes:
        name: of the exit or path; ``"stream"``, ``"idle"``, ``"stream at 10 Hz"``.
        kind: ``"idle"``, ``"exit"``, ``"stream"``, ``"path"``, ``"paced"``, or ``"slope"`` for 2N and 3N repeats.
        start_s: since the profile's own zero, on the clock of :class:`PowerTrace`.
        stop_s: likewise.
        inferences: in it.
        energy_j: used in it.
        bound_j: how far that may be off, by what the sensor leaves open; 95 %.
        updates: of the sensor in it.
        gap_s: longest time without a reading, when that was far longer than usual; else 0.
        median_s: latency of its inferences; ``None`` when idle.
        exits: inferences that left at each exit.
    """

    name: str
    kind: Literal["idle", "exit", "stream", "path", "paced", "slope"]
    start_s: float
    stop_s: float
    inferences: int
    energy_j: float
    bound_j: float
    updates: int
    gap_s: float = 0.0
    median_s: float | None = None
    exits: tuple[int, ...] = ()


class PowerTrace(msgspec.Struct, frozen=True, kw_only=True):
    """Power over the time of the energy windows, as the meter gave it; from a counter, between two readings.

    Attributes:
        times_s: since the profile's own zero.
        power_w: at these times.
    """

    times_s: tuple[float, ...] = ()
    power_w: tuple[float, ...] = ()


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of one inference.

    Attributes:
        name: of the stage, exit or gate.
        kind: ``"input"`` (check and copy), ``"compute"`` (a stage in its runtime), ``"decision"`` (reading a score or
            gate and comparing it), or ``"answer"`` (copying the result out).
        start_ns: since the inference began.
        stop_ns: likewise.
    """

    name: str
    kind: Literal["input", "compute", "decision", "answer"]
    start_ns: int
    stop_ns: int


class TracedRun(msgspec.Struct, frozen=True, kw_only=True):
    """One inference, taken apart.

    Attributes:
        name: of the exit that it was forced to, or ``"stream"``.
        exit: index of the exit where it left.
        start_s: since the profile's own zero.
        total_ns: from beginning to end.
        spans: in order; between them lies what the interpreter needs.
    """

    name: str
    exit: int
    start_s: float
    total_ns: int
    spans: tuple[Span, ...]


class StageTime(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of one stage goes; medians over traced inferences that ran it, in seconds.

    Attributes:
        name: of the stage.
        compute: in its runtime, its head and score included.
        head: of that, the head and its score: with them less without; ``None`` where the stage has no exit or its head
            cannot be left out.
        decision: reading the score or gate value after it and comparing.
        boundary: from the end of what came before (the stage before it, or its decision) to its start: copies and
            calls; of the first stage, input check and copy.
        share: of the time of one inference through all stages.
        relative: compute over that of all other stages in the same inference, a ratio that stays when a whole machine
            slows. ``None`` where there is no other stage.
    """

    name: str
    compute: Interval
    head: Interval | None
    decision: Interval | None
    boundary: Interval
    share: float
    relative: Interval | None = None


class OperatorTime(msgspec.Struct, frozen=True, kw_only=True):
    """One operator of a stage, by the runtime's own profiler.

    Attributes:
        stage: that it is in.
        name: of the node.
        kind: of operator, as ``"Conv"``.
        mean_s: of one call.
        calls: measured.
        share: of its stage's operators.
    """

    stage: str
    name: str
    kind: str
    mean_s: float
    calls: int
    share: float


class Closure(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the parts explain the whole: ``sum_k share_k * mean figure_k`` against the stream's mean figure.

    Attributes:
        quantity: ``"latency"`` or ``"energy"``.
        predicted: from the parts, in seconds or joules.
        measured: of the stream.
    """

    quantity: Literal["latency", "energy"] = "latency"
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted; 1 when the parts explain the whole."""
        return self.measured / self.predicted


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A rule of the protocol, and whether this run kept it.

    Attributes:
        rule: its name, as ``"energy-window"``.
        passed: ``None`` where it could not be looked at.
        says: what was found, against what is allowed.
        advice: what to change; empty when it passed.
    """

    rule: str
    passed: bool | None
    says: str
    advice: str = ""
