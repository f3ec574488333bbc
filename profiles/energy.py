"""Energy of one inference: windows of repeats while a meter is read, with an idle baseline around them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Literal

import msgspec
import numpy as np

from edgekit.distributions import t_quantile
from edgekit.measured import Energy, Interval, MeterFacts, Window
from edgekit.profiles.protocol import Protocol
from edgekit.profiles.recorder import Recorder
from edgekit.profiles.workloads import Workload
from edgekit.progress import Progress

__all__ = [
    "IDLE",
    "EnergyWindows",
    "Inference",
    "difference",
    "energy_of",
    "idle_w",
    "intercept_slope",
    "long_enough",
]

IDLE = "idle"
ENOUGH_UPDATES = 100
"""Updates of the sensor that a window must hold."""
CONTROL_SHARE = 0.1
"""Of a window's length is run just before it without reading the meter: the same work, to see what reading costs."""
CONFIDENCE = 0.95
MEDIAN_COST = 1.2533
"""Standard error of a median over that of a mean, of normal values: the square root of pi over 2."""

Inference = Callable[[], int]
"""Runs one inference and returns the index of the exit where it left."""


def long_enough(seconds: float, facts: MeterFacts) -> float:
    """Seconds of a window: what is asked for, or as long as :data:`ENOUGH_UPDATES` of the sensor take.

    Two updates more, because either end may be as old as the last one.
    """
    update_s = facts.update_interval_s or 0.0
    return max(seconds, ENOUGH_UPDATES * update_s) + 2 * update_s


@dataclass(kw_only=True)
class EnergyWindows:
    """Takes windows one by one; a measurement that is stopped leaves those that it has.

    Attributes:
        recorder: open.
        works: what is run in a window, by the workload that it is.
        protocol: lengths and number of windows.
        rng: order of the windows.
        clock: nanoseconds, the meter's.
        sleep: seconds of doing nothing.
        temperature: hottest part of the device in °C, when anything tells.
        start_c: what that was when the measurement began.
        progress: told after every window.
        renewed: called before every window of work, for other inputs.
        kept: called after every window, when nothing is being measured.
        windows: taken so far.
        costs: latency while the meter is read over that without, for each window.
    """

    recorder: Recorder
    works: Mapping[Workload, Inference]
    protocol: Protocol
    rng: np.random.Generator
    clock: Callable[[], int]
    sleep: Callable[[float], None]
    temperature: Callable[[], float | None]
    progress: Progress
    renewed: Callable[[], None] = lambda: None
    kept: Callable[[], None] = lambda: None
    start_c: float | None = None
    windows: list[Window] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Idle, windows in random order, those of the slope, idle; what was taken before is not taken again.

        Raises:
            MeasurementError: the meter cannot be read any more.
        """
        names = Counter(window.name for window in self.windows if window.kind not in ("slope", "idle"))
        sloped = Counter(window.name for window in self.windows if window.kind == "slope")
        turns = [
            (work, 1)
            for number in range(self.protocol.energy_windows)
            for work in self._shuffled()
            if names[work.name] <= number
        ]
        if self.protocol.slope:
            turns += [(work, times) for times in (2, 3) for work in self._shuffled() if sloped[work.name] < times - 1]
        self.idle()
        for done, (work, times) in enumerate(turns, start=1):
            self.window(work, times=times)
            self.progress("measure energy", done, len(turns))
            self.kept()
        self.idle()

    def idle(self) -> None:
        """A window of doing nothing, unless the protocol gives it no time."""
        if self.protocol.idle_s == 0:
            return
        self.progress("measure idle power", 0, 1)
        start_s = self.recorder.take()
        self.sleep(long_enough(self.protocol.idle_s, self.recorder.facts))
        self._keep(IDLE, "idle", start_s, [], Counter())

    def window(self, work: Workload, *, times: int = 1) -> None:
        """Repeat an inference for the protocol's time, or ``times`` as often as in the first window of its kind."""
        self.renewed()
        self._cool_down()
        run, length_s = self.works[work], long_enough(self.protocol.energy_window_s, self.recorder.facts)
        with self.recorder.paused():
            alone_ns, _ = self._repeat(run, CONTROL_SHARE * length_s, 0)
        first = next((each for each in self.windows if each.name == work.name and each.kind == work.kind), None)
        count = times * first.inferences if times > 1 and first is not None else 0
        start_s = self.recorder.take()
        taken_ns, exits = self._repeat(run, 0.0 if count else length_s, count)
        self._keep(work.name, "slope" if times > 1 else work.kind, start_s, taken_ns, exits)
        # Means: a reading hits few inferences, which a median would not see.
        self.costs.append(fmean(taken_ns) / max(fmean(alone_ns), 1))

    def _shuffled(self) -> list[Workload]:
        works = list(self.works)
        return [works[index] for index in self.rng.permutation(len(works))]

    def _repeat(self, run: Inference, seconds: float, count: int) -> tuple[list[int], Counter[int]]:
        """At least so long, so often, and once. Nanoseconds of each, and where they left."""
        clock, taken_ns, exits = self.clock, list[int](), Counter[int]()
        now = clock()
        end_ns = now + int(seconds * 1e9)
        while True:
            exits[run()] += 1
            after = clock()
            taken_ns.append(after - now)
            now = after
            if now >= end_ns and len(taken_ns) >= count:
                return taken_ns, exits

    def _keep(
        self,
        name: str,
        kind: Literal["idle", "exit", "path", "stream", "slope"],
        start_s: float,
        taken_ns: Sequence[int],
        exits: Counter[int],
    ) -> None:
        stop_s = self.recorder.take()
        found = self.recorder.joules(start_s, stop_s)
        self.windows.append(
            Window(
                name=name,
                kind=kind,
                start_s=start_s,
                stop_s=stop_s,
                inferences=len(taken_ns),
                energy_j=found.energy_j,
                bound_j=found.bound_j,
                updates=found.updates,
                gap_s=found.gap_s,
                median_s=median(taken_ns) * 1e-9 if taken_ns else None,
                exits=tuple(exits[index] for index in range(max(exits) + 1)) if exits else (),
            )
        )

    def _cool_down(self) -> None:
        """Rest until the device is as cool as it began, a degree more allowed, or as long as the protocol gives."""
        end_ns = self.clock() + int(self.protocol.cooldown_s * 1e9)
        while self.clock() < end_ns:
            now_c = self.temperature()
            if self.start_c is not None and now_c is not None and now_c <= self.start_c + 1:
                return
            self.sleep(min(0.5, self.protocol.cooldown_s))


def idle_w(windows: Sequence[Window]) -> tuple[float, ...]:
    """Power of each idle window."""
    return tuple(each.energy_j / (each.stop_s - each.start_s) for each in windows if each.kind == IDLE)


def _idle_ends_w(windows: Sequence[Window]) -> tuple[float, float]:
    """Least and most that idle power may have been in the idle windows."""
    idle = [each for each in windows if each.kind == IDLE]
    lows, highs = (
        [(each.energy_j + sign * each.bound_j) / (each.stop_s - each.start_s) for each in idle] for sign in (-1, 1)
    )
    return min(lows), max(highs)


def energy_of(name: str, windows: Sequence[Window], facts: MeterFacts) -> Energy:
    """Joules of one inference: the median over its windows.

    The interval has two parts that are added: the scatter of the windows, by Student's t for their mean and widened to
    a median, and what the sensor leaves open in one of them. Net energy is less idle power over the same time, which
    lies somewhere between the baselines, what the sensor leaves open in those included.

    Args:
        name: of the workload.
        windows: of a whole measurement.
        facts: of the meter.
    """
    mine = [each for each in windows if each.name == name and each.kind not in ("slope", IDLE)]
    unknown = Energy(method=facts.method, scope=f"{facts.scope}: {facts.covers}", meter=facts.name)
    if not mine:
        reason = f"{facts.name}: no window of '{name}' was finished; resume the measurement"
        return msgspec.structs.replace(unknown, reason=reason)
    each_j = [window.energy_j / window.inferences for window in mine]
    middle = sorted(mine, key=lambda window: window.energy_j / window.inferences)[(len(mine) - 1) // 2]
    gross_j = median(each_j)
    each_s = (middle.stop_s - middle.start_s) / middle.inferences
    half_j = None
    if len(mine) > 2:
        bound_j = median(window.bound_j / window.inferences for window in mine)
        error_j = float(np.std(each_j, ddof=1)) / len(mine) ** 0.5
        half_j = MEDIAN_COST * t_quantile((1 + CONFIDENCE) / 2, len(mine) - 1) * error_j + bound_j
    idle = idle_w(windows)
    least, most = (each_w * each_s for each_w in _idle_ends_w(windows)) if idle else (None, None)
    return msgspec.structs.replace(
        unknown,
        gross_j=gross_j,
        low_j=None if half_j is None else gross_j - half_j,
        high_j=None if half_j is None else gross_j + half_j,
        net_j=gross_j - sum(idle) / len(idle) * each_s if idle else None,
        net_low_j=None if half_j is None or most is None else gross_j - half_j - most,
        net_high_j=None if half_j is None or least is None else gross_j + half_j - least,
        slope_j=intercept_slope(name, windows)[1],
        windows=len(mine),
        window_s=middle.stop_s - middle.start_s,
        inferences=middle.inferences,
    )


def intercept_slope(name: str, windows: Sequence[Window]) -> tuple[float | None, float | None]:
    """Least squares of a workload's energy over its inferences, as criterion does for time: the slope knows no edges.

    Returns:
        Joules of a window without inferences, which is what edges and sensor lag add, and joules of each inference;
        ``None`` twice without windows of twice and three times as many.
    """
    mine = [each for each in windows if each.name == name and each.kind != IDLE]
    if not any(each.kind == "slope" for each in mine):
        return None, None
    slope, intercept = np.polyfit([each.inferences for each in mine], [each.energy_j for each in mine], 1)
    return float(intercept), float(slope)


def difference(after: str, before: str | None, windows: Sequence[Window]) -> Interval | None:
    """Joules of one inference of a workload less those of another; ``None`` with fewer than three windows of either.

    Welch's interval for the difference of means, and the sensor's bounds of both. Means, of which that interval speaks:
    the difference of the medians of :func:`energy_of` is near, and not the same.

    Args:
        after: name of the workload.
        before: of the other; ``None`` for nothing, as before the first exit.
        windows: of a whole measurement.
    """
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for each in windows:
        if each.kind not in ("slope", IDLE):
            groups[each.name].append((each.energy_j / each.inferences, each.bound_j / each.inferences))
    sides = [groups[name] for name in (after, before) if name is not None]
    if any(len(side) < 3 for side in sides):
        return None
    means = [float(np.mean([j for j, _ in side])) for side in sides]
    errors = [float(np.var([j for j, _ in side], ddof=1)) / len(side) for side in sides]
    bound_j = sum(median(bound for _, bound in side) for side in sides)
    weight = sum(error**2 / (len(side) - 1) for error, side in zip(errors, sides, strict=True))
    freedom = sum(errors) ** 2 / weight if weight > 0 else 1.0
    value = means[0] - (means[1] if len(means) > 1 else 0.0)
    half_j = t_quantile((1 + CONFIDENCE) / 2, freedom) * sum(errors) ** 0.5 + bound_j
    return Interval(value=value, low=value - half_j, high=value + half_j)
