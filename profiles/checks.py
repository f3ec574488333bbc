"""The protocol's rules: each a question that a run answers with yes or no, and what to change where it is no.

What only makes figures less certain is a warning (:func:`latency_warnings`); what breaks a rule makes the run invalid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

import numpy as np

from edgekit.measured import Check, Closure, LatencySummary, MeterFacts, Window
from edgekit.profiles.energy import ENOUGH_UPDATES, IDLE, idle_w, intercept_slope
from edgekit.profiles.integrate import Series
from edgekit.profiles.latency import Timings
from edgekit.profiles.protocol import Protocol
from edgekit.profiles.raw import TO_THE_END

__all__ = ["energy_checks", "latency_checks", "latency_warnings"]

LONG_S = 10.0
"""Length of a window that MLPerf Tiny asks for."""
ROUNDING_S = 1e-6
"""Of moments that are told in seconds."""
ENOUGH_STEPS = 100
"""Steps of the sensor that a window's energy must be worth."""
SLOPE = 0.05
"""How far the slope of N, 2N and 3N may be from the windows' own figure."""
SPREAD = 0.05
"""Standard deviation over mean of one workload's windows (Zeus takes a profile back above a threshold of this kind)."""
IDLE_DRIFT = 0.10
"""How much idle power may change over the windows."""
COST = 0.02
"""How much reading the meter may slow down those who work."""
ENERGY_CLOSURE = 0.05
"""How far the stream's energy may be from what its exits explain."""
VARIATION = 0.10
"""Standard deviation over mean that makes a figure doubtful (pyperf)."""


def latency_checks(timings: Timings, closure: Closure, *, protocol: Protocol, done: bool) -> Iterator[Check]:
    """Rules of the latencies.

    Args:
        timings: raw.
        closure: of them.
        protocol: what was asked for.
        done: whether the run was not stopped.
    """
    yield _check(
        "complete",
        done,
        "everything was measured" if done else "the run was stopped before everything was measured",
        "resume it: edgekit profile --resume",
    )
    if timings.steady is not None:
        says = "two stretches of warm-up in a row agree within 2 %"
        yield _check(
            "steady-warm-up",
            timings.steady,
            says if timings.steady else f"no {says}, in {protocol.max_warmup_s:g} s",
            "let the device settle, fix its clocks, or give a longer max_warmup_s",
        )
    fewest = min(timings.taken, key=lambda name: len(timings.taken[name]))
    count = len(timings.taken[fewest])
    yield _check(
        "enough-samples",
        count >= protocol.min_samples and timings.seconds >= protocol.min_seconds,
        f"'{fewest}' has {count} samples of {protocol.min_samples}, in {timings.seconds:.3g} s of "
        f"{protocol.min_seconds:g} s",
        "measure longer, or resume",
    )
    yield _closes("latency-closure", closure, protocol.closure)


def energy_checks(
    windows: Sequence[Window],
    facts: MeterFacts,
    series: Series,
    closure: Closure | None,
    costs: Sequence[float],
    *,
    failure: str,
) -> Iterator[Check]:
    """Rules of the energy windows.

    Args:
        windows: all.
        facts: of the meter.
        series: its readings.
        closure: of energy, where everything was measured.
        costs: latency while the meter is read over that without, for each window.
        failure: why the meter could not be read to the end; empty when it could.
    """
    yield _check(
        TO_THE_END,
        not failure,
        failure or f"{facts.name} was read to the end",
        "mend what the reason names and resume",
    )
    busy = [each for each in windows if each.kind not in (IDLE, "paced")]
    if not busy:
        return
    yield from _window_checks(busy, facts)
    yield from _reading_checks(windows)
    yield _alive(windows, facts, series)
    yield from _agreement_checks(busy, windows, facts)
    if costs:
        cost = median(costs) - 1
        yield _check(
            "reading-costs-little",
            cost <= COST,
            f"inferences take {cost:+.1%} while the meter is read; up to {COST:.0%} is allowed",
            "give the meter a core of its own (taskset), or one with a slower update",
        )
    if closure is not None:
        yield _closes("energy-closure", closure, ENERGY_CLOSURE)


def _window_checks(busy: Sequence[Window], facts: MeterFacts) -> Iterator[Check]:
    """Length and resolution of the windows; the ends of one may be as old as the sensor's last update."""
    shortest = min(busy, key=lambda each: each.stop_s - each.start_s)
    lasted_s = shortest.stop_s - shortest.start_s
    yield _check(
        "energy-window",
        lasted_s >= LONG_S - (facts.update_interval_s or 0.0) - ROUNDING_S,
        f"the shortest window, of '{shortest.name}', lasted {lasted_s:.4g} s; {LONG_S:g} s or more",
        f"give an energy_window_s of {LONG_S:g} or more",
    )
    if facts.resolution:
        steps = [
            each.energy_j / (facts.resolution * (1.0 if facts.quantity == "energy" else each.stop_s - each.start_s))
            for each in busy
        ]
        yield _check(
            "energy-resolution",
            min(steps) >= ENOUGH_STEPS,
            f"a window is worth {min(steps):.3g} steps of {facts.resolution:.3g} {facts.unit}; {ENOUGH_STEPS} or more",
            "give a longer energy_window_s"
            if facts.quantity == "energy"
            else "use a meter of finer steps; this one is too coarse for this load",
        )


def _reading_checks(windows: Sequence[Window]) -> Iterator[Check]:
    """Updates and holes of all windows, idle and paced ones too."""
    fewest = min(windows, key=lambda each: each.updates)
    yield _check(
        "energy-updates",
        fewest.updates >= ENOUGH_UPDATES,
        f"a window of '{fewest.name}' holds {fewest.updates} updates of the sensor; {ENOUGH_UPDATES} or more",
        "give a longer energy_window_s, idle_s or paced_s",
    )
    widest = max(windows, key=lambda each: each.gap_s)
    yield _check(
        "no-holes",
        widest.gap_s == 0,
        f"the meter said nothing for {widest.gap_s:.3g} s in a window of '{widest.name}'"
        if widest.gap_s
        else "the meter was read without holes",
        "stop what keeps the reading thread from running, and measure again",
    )


def _alive(windows: Sequence[Window], facts: MeterFacts, series: Series) -> Check:
    """A sensor that says the same whatever the device does says nothing."""
    told = np.diff(series.values) if facts.quantity == "energy" else series.values
    idle = [each for each in windows if each.kind == IDLE]
    stuck = bool(told.size) and float(told.max()) == float(told.min()) and (bool(idle) or float(told.max()) == 0.0)
    return _check(
        "sensor-alive",
        not stuck,
        f"{facts.name} said the same {told.size} times, idle or not"
        if stuck
        else f"{facts.name} tells idle from busy, or changes",
        "the sensor is stuck or covers something else; use another meter",
    )


def _agreement_checks(busy: Sequence[Window], windows: Sequence[Window], facts: MeterFacts) -> Iterator[Check]:
    """Whether windows of one kind, two ways of counting, and the idle baselines agree."""
    names = list(dict.fromkeys(each.name for each in busy))
    each_j = {name: [w.energy_j / w.inferences for w in busy if w.name == name and w.kind != "slope"] for name in names}
    spreads = {
        name: float(np.std(values, ddof=1) / np.mean(values)) if np.mean(values) > 0 else math.inf
        for name, values in each_j.items()
        if len(values) > 2
    }
    if spreads:
        worst = max(spreads, key=lambda name: spreads[name])
        yield _check(
            "energy-spread",
            spreads[worst] <= SPREAD,
            f"windows of '{worst}' scatter by {spreads[worst]:.1%} of their mean; up to {SPREAD:.0%} is allowed",
            "fix the clocks, stop other work, cool the device, or give longer windows",
        )
    slopes = {name: intercept_slope(name, windows)[1] for name in names}
    apart = {
        name: abs(slope / median(each_j[name]) - 1)
        for name, slope in slopes.items()
        if slope is not None and each_j[name] and median(each_j[name]) > 0
    }
    if apart:
        worst = max(apart, key=lambda name: apart[name])
        yield _check(
            "energy-slope",
            apart[worst] <= SLOPE,
            f"windows of N, 2N and 3N of '{worst}' give {apart[worst]:.1%} another figure than windows of N; "
            f"up to {SLOPE:.0%} is allowed",
            "the sensor lags or its edges count: give longer windows",
        )
    idle = idle_w(windows)
    if len(idle) > 1 and min(idle) > 0:
        drift = max(idle) / min(idle) - 1
        yield _check(
            "idle-drift",
            drift <= IDLE_DRIFT,
            f"idle power went from {min(idle):.3g} W to {max(idle):.3g} W; up to {IDLE_DRIFT:.0%} is allowed",
            "net energy is doubtful: stop other work and let the device settle",
        )


def _closes(rule: str, closure: Closure, limit: float) -> Check:
    known = closure.predicted > 0
    apart = closure.ratio - 1 if known else math.inf
    return _check(
        rule,
        abs(apart) <= limit,
        f"the stream took {apart:+.1%} against what its exits explain; up to {limit:.0%} is allowed",
        "measure longer on a quiet machine",
    )


def _check(rule: str, passed: bool, says: str, advice: str) -> Check:
    return Check(rule=rule, passed=passed, says=says, advice="" if passed else advice)


def latency_warnings(
    summaries: Mapping[str, LatencySummary], *, halves: Mapping[str, float] | None = None, median_within: float = 0.0
) -> Iterator[str]:
    """What about the samples makes the figures less certain, and what to change.

    Args:
        summaries: by name of what was run.
        halves: :func:`edgekit.stats.median_half_width` of those whose medians were to be known to a width, by name.
        median_within: that width, as the protocol has it; 0 where none was asked for.
    """
    wide = {name: half for name, half in (halves or {}).items() if half > median_within > 0}
    unknown = [f"{name} {half:.1%}" if math.isfinite(half) else f"{name} not at all" for name, half in wide.items()]
    if unknown:
        yield (
            f"medians are not known to the {median_within:.1%} asked for ({', '.join(unknown)}): the machine's speed "
            "wanders; fix its frequency and stop other work (edgekit doctor --fix), or measure longer"
        )
    unsteady = [
        f"{name} {summary.sd_s / summary.mean_s:.0%}"
        for name, summary in summaries.items()
        if summary.mean_s > 0 and summary.sd_s / summary.mean_s > VARIATION
    ]
    if unsteady:
        yield (
            f"latency varies by more than {VARIATION:.0%} of its mean ({', '.join(unsteady)}); "
            "read medians, pin threads to one kind of core, fix the frequency, and measure longer"
        )
    for level, key in (("90th", "p90_s"), ("99th", "p99_s")):
        few = [name for name, summary in summaries.items() if getattr(summary, key) is None]
        if few:
            yield (
                f"too few samples for a {level} percentile ({', '.join(few)}); measure longer: the protocol 'standard'"
            )
