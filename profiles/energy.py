"""Energy of one inference: windows of repeats between two readings of a meter, with an idle baseline around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from edgekit import plugins
from edgekit.errors import EdgekitError, MeasurementError
from edgekit.interfaces import Meter
from edgekit.profiles.protocol import Protocol
from edgekit.progress import Progress
from edgekit.records import Energy

__all__ = ["EnergyMeasured", "Reading", "find_meter", "measure_energy"]

ENOUGH_UPDATES = 100
"""Updates of the sensor that a window must hold."""
ENOUGH_STEPS = 100
"""Steps of the sensor that a window's energy must be worth."""


@dataclass(frozen=True)
class Reading:
    """One meter reading.

    Attributes:
        time_ns: of ``time.perf_counter_ns``.
        energy_j: since the meter was opened.
    """

    time_ns: int
    energy_j: float


@dataclass(frozen=True, kw_only=True)
class EnergyMeasured:
    """What the windows gave.

    Attributes:
        energies: of each workload, in order.
        idle_w: power of the idle machine before and after; empty without a baseline.
    """

    energies: tuple[Energy, ...]
    idle_w: tuple[float, ...]


@dataclass(frozen=True)
class _Window:
    seconds: float
    energy_j: float
    inferences: int

    @property
    def each_j(self) -> float:
        return self.energy_j / self.inferences


def find_meter(*, root: Path = Path("/")) -> tuple[Meter | None, str]:
    """The first registered meter that can measure here, recordings left out; else why none can.

    Args:
        root: the folder that stands for ``/``.
    """
    reasons = []
    for name in plugins.names("meters"):
        try:
            meter: Meter = plugins.create("meters", name, root=root)
            if meter.quantity == "replay":
                continue
            reason = meter.unavailable()
        except EdgekitError as error:
            reason = str(error)
        else:
            if reason is None:
                return meter, ""
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons) or "no meter is registered; reinstall edgekit or install a meter plugin"


def measure_energy(
    meter: Meter,
    workloads: Sequence[Callable[[], object]],
    *,
    protocol: Protocol,
    rng: np.random.Generator,
    clock: Callable[[], int],
    sleep: Callable[[float], None],
    progress: Progress,
) -> EnergyMeasured:
    """Joules of one call of each workload: idle, windows in random order, idle.

    Of several windows of one workload the one with the median energy per call is reported. Net energy is gross less
    the mean idle power over the time of one call.

    Args:
        meter: closed; opened here and closed again.
        workloads: each call is one inference, warmed up already.
        protocol: lengths and number of windows.
        rng: order of the windows.
        clock: nanoseconds, the meter's.
        sleep: seconds of doing nothing.
        progress: told after every window.

    Raises:
        MeasurementError: the meter cannot be read.
    """
    seconds = max(protocol.energy_window_s, ENOUGH_UPDATES * (meter.describe().get("update_interval_s") or 0.0))
    windows: list[list[_Window]] = [[] for _ in workloads]
    total, done = len(workloads) * protocol.energy_windows, 0
    meter.open()
    try:
        idle_w = _idle_w(meter, protocol.idle_s, sleep)
        for _ in range(protocol.energy_windows):
            for index in rng.permutation(len(workloads)):
                windows[index].append(_window(meter, workloads[index], seconds=seconds, clock=clock))
                done += 1
                progress("measure energy", done, total)
        idle_w += _idle_w(meter, protocol.idle_s, sleep)
    finally:
        meter.close()
    return EnergyMeasured(energies=tuple(_energy(meter, each, idle_w=idle_w) for each in windows), idle_w=idle_w)


def _window(meter: Meter, work: Callable[[], object], *, seconds: float, clock: Callable[[], int]) -> _Window:
    """Repeat ``work`` for at least ``seconds`` and once."""
    first = meter.read()
    end_ns = first.time_ns + int(seconds * 1e9)
    inferences = 0
    while inferences == 0 or clock() < end_ns:
        work()
        inferences += 1
    return _between(first.time_ns, first.energy_j, meter, inferences)


def _idle_w(meter: Meter, seconds: float, sleep: Callable[[float], None]) -> tuple[float, ...]:
    """Power while nothing is asked for; empty when no time is given to it."""
    if seconds == 0:
        return ()
    first = meter.read()
    sleep(seconds)
    window = _between(first.time_ns, first.energy_j, meter, 1)
    return (window.energy_j / window.seconds,)


def _between(start_ns: int, start_j: float, meter: Meter, inferences: int) -> _Window:
    last = meter.read()
    if last.time_ns <= start_ns:
        raise MeasurementError(f"{meter.name}: no time passed between two readings; give longer energy windows")
    return _Window((last.time_ns - start_ns) * 1e-9, last.energy_j - start_j, inferences)


def _energy(meter: Meter, windows: list[_Window], *, idle_w: tuple[float, ...]) -> Energy:
    chosen = sorted(windows, key=lambda window: window.each_j)[(len(windows) - 1) // 2]
    resolution_j = meter.describe().get("resolution_j")
    if resolution_j and chosen.energy_j < ENOUGH_STEPS * resolution_j:
        return Energy(
            meter=meter.name,
            reason=f"{meter.name}: a window of {chosen.seconds:.3g} s used {chosen.energy_j:.3g} J, less than "
            f"{ENOUGH_STEPS} steps of {resolution_j:.3g} J; give a longer energy_window_s",
        )
    return Energy(
        gross_j=chosen.each_j,
        net_j=chosen.each_j - fmean(idle_w) * chosen.seconds / chosen.inferences if idle_w else None,
        quantity=meter.quantity,
        scope=meter.scope,
        meter=meter.name,
        window_s=chosen.seconds,
        inferences=chosen.inferences,
    )
